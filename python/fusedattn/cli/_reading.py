"""Options that say how texts are read, and reading them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedattn.text import Examples

FORMATS = ("csv", "tsv", "jsonl", "folder", "tab", "trec", "lines")


def add_options(parser: argparse.ArgumentParser) -> None:
    """How texts are read."""
    group = parser.add_argument_group("reading")
    group.add_argument("--format", choices=FORMATS, help="[by the file's ending]")
    group.add_argument("--text-column", metavar="NAME", help="of csv, tsv and jsonl [text, ...]")
    group.add_argument("--label-column", metavar="NAME", help="[label, category, class or target]")
    group.add_argument("--encoding", default="utf-8", help="[%(default)s]")
    group.add_argument("--skip-bad-rows", action="store_true", help="and count them")


def read(
    path: str | Path, args: argparse.Namespace, *, labelled: bool = True, empty: bool = False
) -> Examples:
    """Read what the options say; how many rows were skipped goes to standard error."""
    from fusedattn.text import read_examples

    examples = read_examples(
        path,
        format=args.format,
        labelled=labelled,
        empty=empty,
        text_column=args.text_column,
        label_column=args.label_column,
        encoding=args.encoding,
        skip_bad_rows=args.skip_bad_rows,
    )
    if examples.skipped:
        first = examples.skipped[0]
        print(f"{path}: skipped {len(examples.skipped)} bad rows ({first})", file=sys.stderr)
    return examples


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of all files of `args.data`, none left out: a line of output for each of input."""
    return [
        text for path in args.data for text in read(path, args, labelled=False, empty=True).texts
    ]

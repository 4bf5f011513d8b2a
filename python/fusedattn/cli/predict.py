"""``fusedattn predict``: labels and probabilities for texts, as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from fusedattn.cli import _options


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "predict",
        description="Write a JSON line for each text: the text, the likeliest label, and the "
        "probability of every label. An empty text is a text like any other.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "data", nargs="*", default=["-"], metavar="FILE", help="a text a line, or csv ... [stdin]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="[standard output]")
    parser.add_argument("--resume", action="store_true", help="go on where --out ends")
    parser.add_argument("--threads", type=int, help="of the kernel and of NumPy's BLAS [all cores]")
    _options.add_reading(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Predict chunk by chunk; 0."""
    from fusedattn.encoder import TextClassifier

    if args.resume and args.out is None:
        raise ValueError("--resume: expected --out with it")
    with _options.threads(args.threads):
        model = TextClassifier.from_pretrained(args.model)
        texts = [
            text for path in args.data for text in _options.read(path, args, labelled=False).texts
        ]
        done = 0
        if args.out is None:
            output: IO[str] = sys.stdout
        else:
            done = whole_lines(args.out) if args.resume and args.out.exists() else 0
            output = open(args.out, "a" if done else "w", encoding="utf-8")
        try:
            rest = iter(texts[done:])
            for proba in _options.probabilities(model, texts, done):
                output.writelines(json_lines(model.names, islice(rest, len(proba)), proba))
                output.flush()
        finally:
            if args.out is not None:
                output.close()
    if args.out is not None:
        print(f"Wrote {len(texts) - done:,} lines to {args.out}.", file=sys.stderr)
    return 0


def json_lines(names: Sequence[str], texts: Iterable[str], proba: Any) -> Iterator[str]:
    """A line for each text and its row of probabilities."""
    for text, p in zip(texts, proba, strict=True):
        row = {
            "text": text,
            "label": names[int(p.argmax())],
            "probabilities": {name: round(float(x), 6) for name, x in zip(names, p, strict=True)},
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"


def whole_lines(path: Path) -> int:
    """Cut off what follows the last end of a line, and count the lines."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    os.truncate(path, end)
    return content.count(b"\n", 0, end)

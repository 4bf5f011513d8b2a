"""``fusedattn predict``: labels and probabilities for texts, as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fusedattn.cli import _chunks, _reading, _threads


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "predict",
        description="Write a JSON line for each text: the text, the likeliest label, and the "
        "probability of every label. An empty text is a text like any other. Started again after "
        "Ctrl-C or worse, a command with --out goes on to the same file.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "data", nargs="*", default=["-"], metavar="FILE", help="a text a line, or csv ... [stdin]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="[standard output]")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever --out holds")
    _threads.add_option(parser)
    _reading.add_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Predict chunk by chunk; 0."""
    from fusedattn.encoder import TextClassifier

    if args.out is not None:
        _chunks.check(args.out, args.restart)
    with _threads.limited_to(args.threads):
        model = TextClassifier.from_pretrained(args.model)
        texts = _reading.read_texts(args)
        if args.out is None:
            for content in predicted(model, texts):
                sys.stdout.write(content)
                sys.stdout.flush()
            return 0
        results_of = _chunks.describe(args.model, texts, chunk=_chunks.SIZE)
        with _chunks.Chunks(args.out, results_of, args.restart) as chunks:
            for content in predicted(model, texts, chunks.done * _chunks.SIZE):
                chunks.add(content.encode())
            chunks.finish()
    print(f"Wrote {len(texts):,} lines to {args.out}.", file=sys.stderr)
    return 0


def predicted(model: Any, texts: Sequence[str], start: int = 0) -> Iterator[str]:
    """Yield the lines of the texts from `start` on, chunk after chunk."""
    rest = iter(texts[start:])
    for proba in _chunks.probabilities(model, texts, start):
        yield "".join(json_lines(model.names, islice(rest, len(proba)), proba))


def json_lines(names: Sequence[str], texts: Iterable[str], proba: Any) -> Iterator[str]:
    """A line for each text and its row of probabilities."""
    for text, p in zip(texts, proba, strict=True):
        row = {
            "text": text,
            "label": names[int(p.argmax())],
            "probabilities": {name: round(float(x), 6) for name, x in zip(names, p, strict=True)},
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"

"""``fusedattn encode``: a vector for each text, as one NumPy array."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.cli import _chunks, _reading, _threads


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "encode",
        description="Write a float32 array (texts, width) as .npy, a row for each text in order. "
        "Started again after Ctrl-C or worse, the same command goes on to the same file.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "data", nargs="*", default=["-"], metavar="FILE", help="a text a line, or csv ... [stdin]"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="[%(default)s]")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever --out holds")
    _threads.add_option(parser)
    _reading.add_options(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Encode chunk by chunk; 0."""
    from tqdm import tqdm

    from fusedattn.encoder import Encoder

    _chunks.check(args.out, args.restart)
    size = _chunks.SIZE
    with _threads.limited_to(args.threads):
        encoder = Encoder.from_pretrained(args.model)
        texts = _reading.read_texts(args)
        options = {"normalize": args.normalize, "batch_size": args.batch_size, "chunk": size}
        results_of = _chunks.describe(args.model, texts, **options)
        with _chunks.Chunks(args.out, results_of, args.restart) as chunks:
            start = chunks.done * size
            with tqdm(total=len(texts), initial=start, disable=None, unit="text") as bar:
                for begin in range(start, len(texts), size):
                    part = texts[begin : begin + size]
                    rows = encoder.encode(part, args.batch_size, args.normalize, False)
                    chunks.add(rows.tobytes())
                    bar.update(len(part))
            shape = (len(texts), encoder.config.hidden_size)
            chunks.finish(head=npy_header(shape))
    print(f"Wrote an array {shape} to {args.out}.", file=sys.stderr)
    return 0


def npy_header(shape: tuple[int, int]) -> bytes:
    """What comes before the float32 numbers of an array in a .npy file."""
    head = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, fields)
    return head.getvalue()

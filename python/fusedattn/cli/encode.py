"""``fusedattn encode``: a vector for each text, as one NumPy array."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.cli import _options

CHUNK = 8192  # texts at a time: what a kill can cost


def add_parser(subparsers: Any) -> None:
    """Add this command and its options."""
    parser = subparsers.add_parser(
        "encode",
        description="Write a float32 array (texts, width) as .npy, a row for each text in order.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "data", nargs="*", default=["-"], metavar="FILE", help="a text a line, or csv ... [stdin]"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="[%(default)s]")
    parser.add_argument("--resume", action="store_true", help="go on from a run that was ended")
    parser.add_argument("--threads", type=int, help="of the kernel and of NumPy's BLAS [all cores]")
    _options.add_reading(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Encode chunk by chunk into FILE.npy.partial, and name it FILE.npy when it is whole; 0."""
    from tqdm import tqdm

    from fusedattn.encoder import Encoder

    with _options.threads(args.threads):
        encoder = Encoder.from_pretrained(args.model)
        texts = [t for path in args.data for t in _options.read(path, args, labelled=False).texts]
        width = encoder.config.hidden_size
        partial = args.out.with_name(args.out.name + ".partial")
        size = partial.stat().st_size if args.resume and partial.exists() else 0
        done = size // (CHUNK * width * 4) * CHUNK  # whole chunks of rows
        with (
            open(partial, "r+b" if done else "wb") as file,
            tqdm(total=len(texts), initial=done, disable=None, unit="text") as bar,
        ):
            file.truncate(done * width * 4)
            file.seek(done * width * 4)
            for start in range(done, len(texts), CHUNK):
                chunk = texts[start : start + CHUNK]
                vectors = encoder.encode(chunk, args.batch_size, args.normalize, False)
                file.write(vectors.tobytes())
                file.flush()
                bar.update(len(chunk))
    rows = np.fromfile(partial, np.float32).reshape(len(texts), width)
    with open(args.out, "wb") as file:
        np.save(file, rows)
    partial.unlink()
    print(f"Wrote an array {rows.shape} to {args.out}.", file=sys.stderr)
    return 0

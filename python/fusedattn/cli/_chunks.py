"""A file of results that grows chunk by chunk, so that a run that was ended can go on.

Until all of FILE is there, its chunks lie in the folder FILE.partial, each written whole or not at
all, with a note of what they are results of. The same command goes on after the last of them; one
on other texts, with another model or other options, is refused, as a training is.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fusedattn._whole import whole_file
from fusedattn.cli import _out

SIZE = 1024  # texts to predict or encode at a time: what a kill can cost
NOTE = "of.json"
_MODEL = {".json", ".safetensors", ".txt"}  # the endings of what says what a model computes


class Chunks:
    """The chunks that become the file `out`, those of an earlier run among them.

    As a context it says, where Ctrl-C ends it, that the same command goes on.

    Parameters
    ----------
    out : Path
        Must not be there, or `restart` be True, or chunks be there that were begun so.
    results_of : dict
        What the results depend on, as from `describe`.
    restart : bool
        Leave out what an earlier run did.

    Raises
    ------
    ValueError
        Where `out` is there, or is no file, or chunks of other results are there.
    """

    def __init__(self, out: Path, results_of: dict[str, Any], restart: bool) -> None:
        check(out, restart)
        self.out, self.folder, self.restart = out, partial(out), restart
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.done = 0
        while self._path(self.done).exists():
            self.done += 1
        note = self.folder / NOTE
        if self.done:
            theirs = json.loads(note.read_text(encoding="utf-8"))
            unlike = sorted(k for k, v in results_of.items() if theirs.get(k) != v)
            if unlike:
                raise ValueError(
                    f"--out: {self.folder} holds results that differ in {unlike}; "
                    "--restart begins anew"
                )
            print(f"Going on from {self.folder} (--restart begins anew).", file=sys.stderr)
        else:
            with whole_file(note) as path:
                path.write_text(json.dumps(results_of), encoding="utf-8")

    def __enter__(self) -> Chunks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is KeyboardInterrupt:
            print(f"{_out.again(self.restart)} goes on from {self.folder}.", file=sys.stderr)

    def add(self, content: bytes) -> None:
        """Keep one more chunk."""
        with whole_file(self._path(self.done)) as path:
            path.write_bytes(content)
        self.done += 1

    def finish(self, head: bytes = b"") -> None:
        """Write `out`, `head` and all chunks, whole or not at all; no chunk is needed any more."""
        with whole_file(self.out) as path, open(path, "wb") as file:
            file.write(head)
            for number in range(self.done):
                file.write(self._path(number).read_bytes())
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return _chunk(self.folder, number)


def partial(out: Path) -> Path:
    """The folder of the chunks of `out`."""
    return out.with_name(out.name + ".partial")


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"{number:06}"


def check(out: Path, restart: bool) -> None:
    """A ValueError where `out` may not be written: it is there already, or is no file.

    Where chunks lie beside it, someone has said --restart, and they go on.
    """
    if out.exists() and not out.is_file():
        raise ValueError(f"--out: expected a file, {out} is none")
    if out.exists() and not restart and not _chunk(partial(out), 0).exists():
        raise ValueError(f"--out: {out} is there already; --restart replaces it")


def describe(model: Path, texts: Sequence[str], **options: Any) -> dict[str, Any]:
    """What results depend on: checksums of a model's folder and of texts, and options."""
    crc = 0
    for file in sorted(p for p in model.rglob("*") if p.suffix in _MODEL):
        crc = zlib.crc32(file.read_bytes(), crc)
    return {"model": crc, "texts": zlib.crc32(json.dumps(texts).encode()), **options}


def probabilities(model: Any, texts: Sequence[str], start: int = 0) -> Iterator[Any]:
    """Yield the probabilities of `texts` from `start` on, SIZE texts at a time, with a bar."""
    from tqdm import tqdm

    with tqdm(total=len(texts), initial=start, disable=None, unit="text") as bar:
        for begin in range(start, len(texts), SIZE):
            chunk = texts[begin : begin + SIZE]
            yield model.predict_proba(chunk)
            bar.update(len(chunk))

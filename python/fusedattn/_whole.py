"""Files and folders that appear whole or not at all: the one way in which results are written.

What is written goes into a temporary place beside the target, is flushed to the disk, and is then
renamed. Whenever the process is killed, the old content or the new is there. Checkpoints, models
and the results of the commands come here; of what is read it knows nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end; its folder is made if need be.

    An exception inside leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    yield temporary
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to write into, whose files then take their places in `path`.

    `path` appears whole, or keeps what it had: where it exists, each file is replaced by a complete
    one, all of them having been written before the first is moved.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        folder = Path(name) / "folder"
        folder.mkdir()
        yield folder
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:
            _flush(file)
        if path.exists():
            for file in files:
                target = path / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
                _flush(target.parent)
        else:
            os.rename(folder, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except OSError:
        if is_folder:  # Windows opens none
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

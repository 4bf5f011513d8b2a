"""What a figure depends on besides the code: machine, instruction set, threads, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["blas_threads", "chosen_isa", "surroundings", "write_json"]


def surroundings(threads: int) -> dict[str, Any]:
    """The facts by name, in the order in which they are printed."""
    import fusedattn

    facts = fusedattn.cpu_info()
    about = {
        "fusedattn": fusedattn.__version__,
        "cpu": facts["cpu"],
        "isa": facts["isa"],
        "threads": threads,
        "parallel": facts["parallel"],
        "compiler": facts["compiler"],
        "python": platform.python_version(),
    }
    for package in ("numpy", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[package] = importlib.metadata.version(package)
    return about


def blas_threads(threads: int) -> contextlib.AbstractContextManager[Any]:
    """Give NumPy's BLAS the same threads where threadpoolctl is installed to say so."""
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[Any] = threadpool_limits(threads, user_api="blas")
    return limits


@contextlib.contextmanager
def chosen_isa(name: str | None) -> Iterator[None]:
    """Use an instruction set while the block runs; None keeps the one in use."""
    from fusedattn import _core

    if not name:
        yield
        return
    _core.set_isa(name)
    try:
        yield
    finally:
        _core.set_isa("")


def write_json(path: Path, about: dict[str, Any], results: list[Any]) -> None:
    """What was measured, and where."""
    record = {"about": about, "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

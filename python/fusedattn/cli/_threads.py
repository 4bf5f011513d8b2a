"""The option --threads, and giving the kernel and NumPy's BLAS so many."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator


def add_option(parser: argparse._ActionsContainer) -> None:
    """Add --threads."""
    parser.add_argument("--threads", type=int, help="of the kernel and of NumPy's BLAS [all cores]")


@contextlib.contextmanager
def limited_to(count: int | None) -> Iterator[None]:
    """Let the kernel and the BLAS have so many threads."""
    if count is None:
        yield
        return
    from threadpoolctl import threadpool_limits

    from fusedattn import get_num_threads, set_num_threads

    before = get_num_threads()
    set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        set_num_threads(before)

"""Elementwise chains run over a few rows at a time, so that they stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from fusedattn.nn._types import Array

# Half of a small L2: a chain touches two to four arrays of this size at once.
BLOCK_BYTES = 128 * 1024


def row_blocks(x: Array) -> Iterator[slice]:
    """Yield slices that cover the rows of `x`, each of about BLOCK_BYTES."""
    rows = len(x)
    step = max(1, BLOCK_BYTES // max(1, x[:1].nbytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))

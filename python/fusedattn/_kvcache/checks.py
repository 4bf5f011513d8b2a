"""Checks that the cache and attention to it share; errors name argument, expected and received."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_sizes(sizes: dict[str, Any]) -> None:
    """Raise unless all are integers of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"{name}: expected an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def check_layout(layout: Any) -> None:
    """Raise unless it is one of the two."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: expected 'bhsd' or 'bshd', got {layout!r}")


def per_sequence(name: str, x: ArrayLike, batch: int, most: Any) -> NDArray[np.int64]:
    """One number for each sequence, from 0 to ``most``, itself one or one for each."""
    given = np.asarray(x)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {given.dtype}")
    if given.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected an integer or shape ({batch},), got {given.shape}")
    counts = np.broadcast_to(given, batch).astype(np.int64)
    wrong = np.flatnonzero((counts < 0) | (counts > most))
    if wrong.size:
        b = int(wrong[0])
        highest = np.broadcast_to(most, batch)[b]
        raise ValueError(f"{name}: expected from 0 to {highest} for sequence {b}, got {counts[b]}")
    return counts

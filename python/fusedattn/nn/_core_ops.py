"""The operations of the C++ core that layers stand on, with their results allocated.

The products are the core's own, not NumPy's BLAS: an activation, a residual or a bias is done to a
tile while it is in the first cache, the bits of a row do not depend on the batch it is in, and they
are faster (docs/layers.md says more).
"""

from __future__ import annotations

import math

import numpy as np

from fusedattn import _core
from fusedattn.nn._types import Array, Rng


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """An array that begins at a cache line.

    NumPy's large ones begin 16 bytes after one, so that every vector of 64 bytes straddles two
    lines: a product takes 20 % longer.
    """
    size = math.prod(shape)
    memory = np.empty(size + 64 // dtype.itemsize, dtype)
    first = -memory.__array_interface__["data"][0] % 64 // dtype.itemsize
    return memory[first : first + size].reshape(shape)


def rows_of(x: Array) -> Array:
    """`x` (T, width) itself, or a copy where its rows have gaps."""
    return x if x.strides[-1] == x.itemsize or x.shape[-1] == 1 else np.ascontiguousarray(x)


def product(
    a: Array,
    b: Array,
    *,
    bias: Array | None = None,
    added: Array | None = None,
    then: str = "nothing",
    slope: Array | None = None,
    row_sums: Array | None = None,
) -> Array:
    """then(added + bias + a b).

    Parameters
    ----------
    a : array (m, k)
        Rows or columns without gaps: x and x.T will do.
    b : array (k, n)
        Likewise.
    bias : array (n,), optional
    added : array (m, n), optional
    then : str, default "nothing"
        "relu", "gelu", "gelu_tanh" or "tanh"; or "times", the product with `slope`.
    slope : array (m, n), optional
        Written by an activation: its derivative.
    row_sums : array (m,), optional
        Written: the sums of a's rows; a's columns have no gaps.

    Returns
    -------
    array (m, n)
    """
    c = empty((a.shape[0], b.shape[1]), a.dtype)
    _core.product(a, b, c, bias, added, slope, row_sums, then)
    return c


def activate(x: Array, then: str) -> tuple[Array, Array]:
    """An activation and its derivative, element by element."""
    y, slope = np.array(x, order="C"), empty(x.shape, x.dtype)
    _core.activate(y, slope, then)
    return y, slope


def gather_sum(tables: list[Array], ids: list[Array]) -> Array:
    """The sum over i of tables[i][ids[i]]; ids are int64."""
    y = empty((len(ids[0]), tables[0].shape[1]), tables[0].dtype)
    _core.gather_sum(tables, ids, y)
    return y


def scatter_sum(x: Array, ids: Array, rows: int) -> Array:
    """An array of so many rows, row r the sum of the rows of `x` whose id is r, in their order."""
    y = np.zeros((rows, x.shape[1]), x.dtype)
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1, append=rows))
    _core.scatter_sum(x, order, first, ordered[first[:-1]], y)
    return y


def drop(x: Array, added: Array | None, p: float, seed: int) -> Array:
    """added + x with each element zeroed with probability p, the rest scaled by 1 / (1 - p)."""
    y = empty(x.shape, x.dtype)
    threshold = min(round((1.0 - p) * 2**32), 2**32 - 1)
    _core.drop_rows(x, added, y, seed, threshold, 2.0**32 / threshold)
    return y


def draw_seed(rng: Rng) -> int:
    """A seed for one use of dropout."""
    return int(rng.integers(2**63))

"""The largest value of each packed sequence, feature by feature."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._types import VJP, Array, Params


def max_pool(params: Params, x: Array, cu_seqlens: Array) -> tuple[Array, VJP]:
    """Take the maximum over the rows of each sequence; an empty sequence gives 0.

    Where several rows hold the maximum, the gradient goes to the first. A NaN is a maximum.

    Parameters
    ----------
    params : dict
        Empty: the layer has none.
    x : array (T, width)
    cu_seqlens : int array (N + 1,)
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1] of `x`.

    Returns
    -------
    y : array (N, width)
    vjp : callable
        dy (N, width) -> ({}, dx).
    """
    full = np.flatnonzero(np.diff(cu_seqlens))
    bounds = cu_seqlens.tolist()
    rows = np.empty((len(full), x.shape[1]), np.int64)
    for row, n in zip(rows, full.tolist(), strict=True):
        np.argmax(x[bounds[n] : bounds[n + 1]], axis=0, out=row)
        row += bounds[n]
    columns = np.arange(x.shape[1])
    y = np.zeros((len(bounds) - 1, x.shape[1]), x.dtype)
    y[full] = x[rows, columns]

    def vjp(dy: Array) -> tuple[Params, Array]:
        dx = np.zeros(x.shape, dy.dtype)
        dx[rows, columns] = dy[full]
        return {}, dx

    return y, vjp

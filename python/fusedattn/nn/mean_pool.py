"""The mean of each packed sequence."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._types import VJP, Array, Params


def mean_pool(params: Params, x: Array, cu_seqlens: Array) -> tuple[Array, VJP]:
    """Average the rows of each sequence; an empty sequence gives 0.

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
    lengths = np.diff(cu_seqlens)
    weight = (1.0 / np.maximum(lengths, 1)).astype(x.dtype)[:, None]
    y = np.empty((len(lengths), x.shape[1]), x.dtype)
    bounds = cu_seqlens.tolist()
    # One reduction a sequence: np.add.reduceat takes twice as long and errs on empty sequences.
    for n in range(len(y)):
        np.add.reduce(x[bounds[n] : bounds[n + 1]], axis=0, out=y[n])
    y *= weight

    def vjp(dy: Array) -> tuple[Params, Array]:
        return {}, np.repeat(dy * weight, lengths, axis=0)

    return y, vjp

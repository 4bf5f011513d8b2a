"""The first row of each packed sequence, where BERT's [CLS] token stands (arXiv:1810.04805)."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._types import VJP, Array, Params


def cls_pool(params: Params, x: Array, cu_seqlens: Array) -> tuple[Array, VJP]:
    """Take the first row of each sequence; an empty sequence gives 0.

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
    first = cu_seqlens[full]
    y = np.zeros((len(cu_seqlens) - 1, x.shape[1]), x.dtype)
    y[full] = x[first]

    def vjp(dy: Array) -> tuple[Params, Array]:
        dx = np.zeros(x.shape, dy.dtype)
        dx[first] = dy[full]
        return {}, dx

    return y, vjp

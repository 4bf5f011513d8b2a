"""Layer normalisation (Ba, Kiros and Hinton, arXiv:1607.06450)."""

from __future__ import annotations

import numpy as np

from fusedattn import _core
from fusedattn.nn._core_ops import empty, rows_of
from fusedattn.nn._frozen import learns
from fusedattn.nn._types import VJP, Array, Params, Shapes


def layer_norm_shapes(width: int) -> Shapes:
    """``weight`` and ``bias``, both (width,)."""
    return {"weight": (width,), "bias": (width,)}


def init_layer_norm(width: int) -> Params:
    """Parameters of `layer_norm_shapes`: scale 1 and shift 0; float32."""
    return {"weight": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}


def layer_norm(params: Params, x: Array, eps: float = 1e-12) -> tuple[Array, VJP]:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over each row.

    Parameters
    ----------
    params : dict
        As from `init_layer_norm`.
    x : array (T, width)
    eps : float, default 1e-12
        Added to the (biased) variance.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx).
    """
    weight, x = params["weight"], rows_of(x)
    y = empty(x.shape, x.dtype)
    mean, rstd = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    _core.layer_norm(x, y, weight, params["bias"], mean, rstd, eps)

    def vjp(dy: Array) -> tuple[Params, Array]:
        dx = empty(x.shape, x.dtype)
        dweight, dbias = np.empty_like(weight), np.empty_like(weight)
        _core.layer_norm_backward(x, rows_of(dy), dx, weight, mean, rstd, dweight, dbias)
        return {"weight": dweight, "bias": dbias} if learns(params) else {}, dx

    return y, vjp

"""Layer normalisation (Ba, Kiros and Hinton, arXiv:1607.06450)."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._rows import row_blocks
from fusedattn.nn._types import VJP, Array, Params, Rng


def init_layer_norm(width: int) -> Params:
    """Scale 1 and shift 0; float32.

    Returns
    -------
    dict
        ``weight`` and ``bias``, both (width,).
    """
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
    weight, bias = params["weight"], params["bias"]
    width = x.shape[1]
    average = np.full(width, 1.0 / width, x.dtype)
    y, xhat = np.empty_like(x), np.empty_like(x)
    rstd = np.empty((len(x), 1), x.dtype)
    for rows in row_blocks(x):
        h = np.subtract(x[rows], (x[rows] @ average)[:, None], out=xhat[rows])
        variance = np.vecdot(h, h) / width
        rstd[rows, 0] = 1.0 / np.sqrt(variance + eps)
        h *= rstd[rows]
        np.multiply(h, weight, out=y[rows])
        y[rows] += bias

    def vjp(dy: Array) -> tuple[Params, Array]:
        dweight, dbias = np.zeros_like(weight), np.zeros_like(bias)
        dx = np.empty_like(dy)
        for rows in row_blocks(dy):
            h, g = xhat[rows], dx[rows]
            ones = np.ones(len(h), dy.dtype)
            dbias += ones @ dy[rows]
            dweight += ones @ np.multiply(dy[rows], h, out=g)
            # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight
            np.multiply(dy[rows], weight, out=g)
            along = np.vecdot(g, h)[:, None] / width
            g -= (g @ average)[:, None]
            g -= h * along
            g *= rstd[rows]
        return {"weight": dweight, "bias": dbias}, dx

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    params = {"weight": rng.standard_normal(6), "bias": rng.standard_normal(6)}
    return params, (rng.standard_normal((4, 6)),), {"eps": 1e-5}

"""y = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, the GELU of arXiv:1606.08415 by tanh."""

from __future__ import annotations

import math

import numpy as np

from fusedattn.nn._rows import row_blocks
from fusedattn.nn._types import VJP, Array, Params, Rng

_C = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def gelu_tanh(params: Params, x: Array) -> tuple[Array, VJP]:
    """GELU in its tanh form, element by element.

    Parameters
    ----------
    params : dict
        Empty: the layer has none.
    x : array (T, width)

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> ({}, dx).
    """
    y, tanh = np.empty_like(x), np.empty_like(x)
    for rows in row_blocks(x):
        xb, t = x[rows], tanh[rows]
        np.multiply(xb, xb, out=t)
        t *= _C * _CUBIC
        t += _C
        t *= xb
        np.tanh(t, out=t)
        h = np.add(t, 1.0, out=y[rows])
        h *= xb
        h *= 0.5

    def vjp(dy: Array) -> tuple[Params, Array]:
        dx = np.empty_like(dy)
        for rows in row_blocks(dy):
            # dx = dy/2 * (1 + t + x (1 - t²) u'),  u' = C (1 + 3 * 0.044715 x²)
            xb, t = x[rows], tanh[rows]
            g = np.multiply(xb, xb, out=dx[rows])
            g *= 3.0 * _C * _CUBIC
            g += _C
            g *= xb
            sech2 = t * t
            np.subtract(1.0, sech2, out=sech2)
            g *= sech2
            g += t
            g += 1.0
            g *= 0.5
            g *= dy[rows]
        return {}, dx

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    return {}, (2.0 * rng.standard_normal((4, 6)),), {}

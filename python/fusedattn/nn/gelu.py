"""y = x Φ(x), Φ the normal distribution function (Hendrycks and Gimpel, arXiv:1606.08415)."""

from __future__ import annotations

import math

import numpy as np

from fusedattn.nn._rows import row_blocks
from fusedattn.nn._types import VJP, Array, Params, Rng

_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error of erf| <= 1.5e-7.
_P = 0.3275911
_A = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_exact_erf = np.vectorize(math.erf, otypes=[float])


def _normal_cdf(x: Array, out: Array) -> None:
    """out = Φ(x): to 1e-7 in float32, to the last bits (and slowly) in float64."""
    if x.dtype != np.float32:
        out[...] = _exact_erf(x * math.sqrt(0.5))
        out += 1.0
        out *= 0.5
        return
    t = np.abs(x)
    t *= _P * math.sqrt(0.5)
    t += 1.0
    np.reciprocal(t, out=t)
    np.multiply(t, _A[0], out=out)
    for a in _A[1:]:
        out += a
        out *= t
    np.multiply(x, x, out=t)
    t *= -0.5
    np.exp(t, out=t)
    out *= t
    out *= 0.5  # Φ(-|x|)
    # Φ(x) = 1/2 ± (1/2 - Φ(-|x|)), with the sign of x.
    out -= 0.5
    np.copysign(out, x, out=out)
    out += 0.5


def gelu(params: Params, x: Array) -> tuple[Array, VJP]:
    """The exact GELU, element by element.

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
    y, cdf = np.empty_like(x), np.empty_like(x)
    for rows in row_blocks(x):
        _normal_cdf(x[rows], cdf[rows])
        np.multiply(x[rows], cdf[rows], out=y[rows])

    def vjp(dy: Array) -> tuple[Params, Array]:
        dx = np.empty_like(dy)
        for rows in row_blocks(dy):
            # dx = dy * (Φ(x) + x φ(x))
            g = np.multiply(x[rows], x[rows], out=dx[rows])
            g *= -0.5
            np.exp(g, out=g)
            g *= _INV_SQRT_2PI
            g *= x[rows]
            g += cdf[rows]
            g *= dy[rows]
        return {}, dx

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    return {}, (2.0 * rng.standard_normal((4, 6)),), {}

"""Dropout (Srivastava et al., JMLR 15, 2014), inverted: what is kept is scaled up in training."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._types import VJP, Array, Params, Rng


def dropout(params: Params, x: Array, p: float, rng: Rng | None) -> tuple[Array, VJP]:
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p).

    Parameters
    ----------
    params : dict
        Empty: the layer has none.
    x : array (T, width)
    p : float
        In [0, 1), rounded to a multiple of 2**-16.
    rng : numpy.random.Generator or None
        The source of the mask, drawn from; None, as when a model is only used, means no dropout.

    Returns
    -------
    y : array (T, width)
        `x` itself where there is nothing to drop.
    vjp : callable
        dy (T, width) -> ({}, dx).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}")
    kept = round((1.0 - p) * 65536)
    if rng is None or kept == 65536:
        return x, lambda dy: ({}, dy)
    # Four draws of 16 bits from each 64 raw bits: a third of the time of rng.random.
    raw = rng.bit_generator.random_raw(-(-x.size // 4)).view(np.uint16)
    keep = (raw[: x.size] < kept).reshape(x.shape)

    def drop(a: Array) -> Array:
        y = keep.astype(a.dtype)
        y *= a
        y *= 65536.0 / kept
        return y

    return drop(x), lambda dy: ({}, drop(dy))


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    return {}, (rng.standard_normal((4, 6)),), {"p": 0.3, "rng": rng}

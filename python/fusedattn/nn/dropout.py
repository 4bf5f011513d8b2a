"""Dropout (Srivastava et al., JMLR 15, 2014), inverted: what is kept is scaled up in training."""

from __future__ import annotations

from fusedattn.nn._core_ops import draw_seed, drop, rows_of
from fusedattn.nn._types import VJP, Array, Params, Rng


def dropout(
    params: Params, x: Array, p: float, rng: Rng | None, *, added: Array | None = None
) -> tuple[Array, VJP]:
    """Zero each element with probability `p` and scale the rest by 1 / (1 - p).

    Which elements are kept is a hash of a seed and of their place: nothing is stored for the
    backward pass.

    Parameters
    ----------
    params : dict
        Empty: the layer has none.
    x : array (T, width)
    p : float
        In [0, 1), rounded to a multiple of 2**-32.
    rng : numpy.random.Generator or None
        A seed is drawn from it; None, as when a model is only used, means no dropout.
    added : array (T, width), optional
        Joins y in the same pass; its gradient is dy.

    Returns
    -------
    y : array (T, width)
        `x` itself where there is nothing to drop or add.
    vjp : callable
        dy (T, width) -> ({}, dx).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}")
    if rng is None or p == 0.0:
        return x if added is None else x + added, lambda dy: ({}, dy)
    seed = draw_seed(rng)
    return drop(rows_of(x), added, p, seed), lambda dy: ({}, drop(rows_of(dy), None, p, seed))

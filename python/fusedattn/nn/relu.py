"""y = max(x, 0)."""

from __future__ import annotations

from fusedattn.nn._core_ops import activate
from fusedattn.nn._types import VJP, Array, Params


def relu(params: Params, x: Array) -> tuple[Array, VJP]:
    """The positive part, element by element; the slope at 0 is taken as 0.

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
    y, slope = activate(x, "relu")
    return y, lambda dy: ({}, dy * slope)

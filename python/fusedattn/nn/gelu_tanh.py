"""y = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, the GELU of arXiv:1606.08415 by tanh."""

from __future__ import annotations

from fusedattn.nn._core_ops import activate
from fusedattn.nn._types import VJP, Array, Params


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
    y, slope = activate(x, "gelu_tanh")
    return y, lambda dy: ({}, dy * slope)

"""y = tanh(x), between the two layers of BERT's classification head (arXiv:1810.04805)."""

from __future__ import annotations

from fusedattn.nn._core_ops import activate
from fusedattn.nn._types import VJP, Array, Params


def tanh(params: Params, x: Array) -> tuple[Array, VJP]:
    """The hyperbolic tangent, element by element.

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
    y, slope = activate(x, "tanh")
    return y, lambda dy: ({}, dy * slope)

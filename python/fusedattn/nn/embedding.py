"""y = weight[ids]: tokens, positions or types."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._types import VJP, Array, Params, Rng


def init_embedding(rng: Rng, rows: int, width: int, std: float = 0.02) -> Params:
    """A table drawn from N(0, std²); float32.

    Returns
    -------
    dict
        ``weight`` (rows, width).
    """
    weight = rng.standard_normal((rows, width), dtype=np.float32)
    weight *= std
    return {"weight": weight}


def embedding(params: Params, ids: Array) -> tuple[Array, VJP]:
    """Look rows up in a table.

    Parameters
    ----------
    params : dict
        As from `init_embedding`.
    ids : int array (T,)
        Each in [0, rows).

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx), dx an empty array: integers have no gradient.
    """
    weight = params["weight"]
    y = np.take(weight, ids, axis=0)

    def vjp(dy: Array) -> tuple[Params, Array]:
        dweight = np.zeros(weight.shape, dy.dtype)
        if len(ids):
            # Sort so that equal ids are neighbours, then sum each run: np.add.at costs 2.5x this.
            order = np.argsort(ids, kind="stable")
            ordered = ids[order]
            first = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
            dweight[ordered[first]] = np.add.reduceat(np.take(dy, order, axis=0), first, axis=0)
        return {"weight": dweight}, np.empty((0,), dy.dtype)

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    return init_embedding(rng, 5, 3, std=1.0), (np.array([4, 0, 4, 1, 4, 0]),), {}

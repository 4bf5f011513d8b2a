"""y = weight[ids]: tokens, positions or types."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._core_ops import gather_sum, rows_of, scatter_sum
from fusedattn.nn._frozen import learns
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import VJP, Array, Params, Rng, Shapes


def embedding_shapes(rows: int, width: int) -> Shapes:
    """``weight`` (rows, width)."""
    return {"weight": (rows, width)}


def init_embedding(rng: Rng, rows: int, width: int, std: float = 0.02) -> Params:
    """A table of `embedding_shapes`, drawn from N(0, std²); float32."""
    return draw(rng, embedding_shapes(rows, width), std)


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
    weight, ids = params["weight"], np.ascontiguousarray(ids, np.int64)
    y = gather_sum([weight], [ids])

    def vjp(dy: Array) -> tuple[Params, Array]:
        nothing = np.empty((0,), dy.dtype)
        if not learns(params):
            return {}, nothing
        return {"weight": scatter_sum(rows_of(dy), ids, len(weight))}, nothing

    return y, vjp

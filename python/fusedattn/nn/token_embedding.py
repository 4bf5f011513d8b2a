"""BERT's input layer (arXiv:1810.04805): word, position and type, normalised."""

from __future__ import annotations

import numpy as np

from fusedattn.nn._core_ops import gather_sum, scatter_sum
from fusedattn.nn._frozen import learns
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import VJP, Array, Params, Rng, Shapes
from fusedattn.nn.dropout import dropout
from fusedattn.nn.embedding import embedding_shapes
from fusedattn.nn.layer_norm import layer_norm, layer_norm_shapes


def token_embedding_shapes(vocab_size: int, positions: int, types: int, width: int) -> Shapes:
    """Tables ``word``, ``position`` and, unless `types` is 0, ``type``, and a layer ``norm``."""
    rows = {"word": vocab_size, "position": positions} | ({"type": types} if types else {})
    tables = {name: embedding_shapes(count, width) for name, count in rows.items()}
    return tables | {"norm": layer_norm_shapes(width)}


def init_token_embedding(
    rng: Rng, vocab_size: int, positions: int, types: int, width: int, std: float = 0.02
) -> Params:
    """Parameters of `token_embedding_shapes`: tables drawn from N(0, std²), the norm 1 and 0."""
    return draw(rng, token_embedding_shapes(vocab_size, positions, types, width), std)


def token_embedding(
    params: Params,
    ids: Array,
    cu_seqlens: Array,
    *,
    types: Array | None = None,
    first_position: int = 0,
    eps: float = 1e-12,
    p: float = 0.0,
    rng: Rng | None = None,
) -> tuple[Array, VJP]:
    """dropout(norm(word[id] + position[place in the sequence] + type[type])).

    Parameters
    ----------
    params : dict
        As from `init_token_embedding`; without ``type`` there are no types (DistilBERT).
    ids : int array (T,)
        Token ids, sequences end to end.
    cu_seqlens : int array (N + 1,)
        Sequence n is ids[cu_seqlens[n]:cu_seqlens[n + 1]].
    types : int array (T,), optional
        By default all 0.
    first_position : int, default 0
        The row of ``position`` that a sequence begins with; RoBERTa's is 2.
    eps, p, rng
        Of the layer norm; dropout's probability and source, no dropout without `rng`.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx), dx an empty array: integers have no gradient.
    """
    places = np.arange(first_position, first_position + len(ids))
    places -= np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    chosen = {"word": np.ascontiguousarray(ids, np.int64), "position": places}
    if "type" in params:
        chosen["type"] = np.zeros(len(ids), np.int64)
        if types is not None:
            chosen["type"] += types
    tables = {name: params[name]["weight"] for name in chosen}
    x = gather_sum(list(tables.values()), list(chosen.values()))
    y, norm_vjp = layer_norm(params["norm"], x, eps)
    y, drop_vjp = dropout({}, y, p, rng)

    def vjp(dy: Array) -> tuple[Params, Array]:
        dnorm, dx = norm_vjp(drop_vjp(dy)[1])
        grads: Params = {
            name: {"weight": scatter_sum(dx, chosen[name], len(table))}
            for name, table in tables.items()
            if learns(params[name])
        }
        return grads | {"norm": dnorm}, np.empty((0,), dx.dtype)

    return y, vjp

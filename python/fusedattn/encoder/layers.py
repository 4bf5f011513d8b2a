"""The encoder as one function of its parameters: embeddings, blocks, and their vjp."""

from __future__ import annotations

import numpy as np

from fusedattn import nn
from fusedattn.encoder.config import EncoderConfig
from fusedattn.nn import VJP, Array, Params, Rng, Shapes


def encoder_shapes(config: EncoderConfig) -> Shapes:
    """The shapes of an encoder's parameters: ``embeddings``, ``blocks`` and, pre-norm, ``norm``."""
    width = config.hidden_size
    shapes: Shapes = {
        "embeddings": nn.token_embedding_shapes(
            config.vocab_size, config.max_position_embeddings, config.type_vocab_size, width
        ),
        "blocks": {
            str(n): nn.encoder_block_shapes(width, config.intermediate_size)
            for n in range(config.num_hidden_layers)
        },
    }
    if config.norm_first:
        shapes["norm"] = nn.layer_norm_shapes(width)
    return shapes


def init_encoder(rng: Rng, config: EncoderConfig) -> Params:
    """Parameters of `encoder_shapes`: weights from N(0, initializer_range²), float32."""
    return nn.draw(rng, encoder_shapes(config), config.initializer_range)


def hidden_states(
    params: Params, config: EncoderConfig, ids: Array, cu_seqlens: Array, rng: Rng | None = None
) -> tuple[Array, VJP]:
    """The hidden state of every token.

    Parameters
    ----------
    params : dict
        As from `init_encoder`.
    config : EncoderConfig
    ids : int array (T,)
        Token ids, sequences end to end.
    cu_seqlens : int array (N + 1,)
        Sequence n is ids[cu_seqlens[n]:cu_seqlens[n + 1]].
    rng : numpy.random.Generator, optional
        The source of dropout; without it there is none.

    Returns
    -------
    hidden : array (T, hidden_size)
    vjp : callable
        dhidden -> (dparams, an empty array: ids have no gradient). It goes down to the lowest
        part that learns, and no further: what is `fusedattn.nn.Frozen` has no gradients.

    Raises
    ------
    ValueError
        For an id outside the vocabulary or a sequence longer than max_position_embeddings.
    """
    x, embeddings_vjp = _embed(params, config, ids, cu_seqlens, rng)
    block_vjps: dict[str, VJP] = {}
    for name, block in params["blocks"].items():
        x, block_vjps[name] = _block(block, config, x, cu_seqlens, rng)
    if config.norm_first:
        x, last_vjp = nn.layer_norm(params["norm"], x, config.layer_norm_eps)
    parts = [params["embeddings"], *params["blocks"].values()]
    lowest = next((i for i, part in enumerate(parts) if nn.learns(part)), len(parts))

    def vjp(dx: Array) -> tuple[Params, Array]:
        grads: Params = {"embeddings": {}, "blocks": {}}
        if config.norm_first:
            grads["norm"], dx = last_vjp(dx)
        for name in reversed(list(block_vjps)[max(0, lowest - 1) :]):
            grads["blocks"][name], dx = block_vjps[name](dx)
        if lowest == 0:
            grads["embeddings"], dx = embeddings_vjp(dx)
        return grads, np.empty((0,), dx.dtype)

    return x, vjp


def infer(params: Params, config: EncoderConfig, ids: Array, cu_seqlens: Array) -> Array:
    """`hidden_states` without their vjp: what a block keeps for its vjp is freed after it."""
    x = _embed(params, config, ids, cu_seqlens, None)[0]
    for block in params["blocks"].values():
        x = _block(block, config, x, cu_seqlens, None)[0]
    if config.norm_first:
        x = nn.layer_norm(params["norm"], x, config.layer_norm_eps)[0]
    return x


def _embed(
    params: Params, config: EncoderConfig, ids: Array, cu_seqlens: Array, rng: Rng | None
) -> tuple[Array, VJP]:
    _check_tokens(config, ids, cu_seqlens)
    eps, p = config.layer_norm_eps, config.hidden_dropout_prob
    return nn.token_embedding(params["embeddings"], ids, cu_seqlens, eps=eps, p=p, rng=rng)


def _block(
    params: Params, config: EncoderConfig, x: Array, cu_seqlens: Array, rng: Rng | None
) -> tuple[Array, VJP]:
    return nn.encoder_block(
        params,
        x,
        cu_seqlens,
        config.num_attention_heads,
        norm_first=config.norm_first,
        activation=config.hidden_act,
        eps=config.layer_norm_eps,
        p=config.hidden_dropout_prob,
        attention_p=config.attention_probs_dropout_prob,
        rng=rng,
    )


def _check_tokens(config: EncoderConfig, ids: Array, cu_seqlens: Array) -> None:
    if len(ids) and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise ValueError(
            f"ids: expected values in [0, {config.vocab_size}), got {ids.min()} to {ids.max()}"
        )
    longest = int(np.diff(cu_seqlens).max(initial=0))
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"cu_seqlens: expected sequences of at most {config.max_position_embeddings} tokens "
            f"(max_position_embeddings), got one of {longest}"
        )

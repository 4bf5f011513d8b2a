"""The encoder as one function of its parameters: embeddings, blocks, and their vjp."""

from __future__ import annotations

import numpy as np

from fusedattn import nn
from fusedattn.encoder.config import EncoderConfig
from fusedattn.nn import VJP, Array, Params, Rng


def init_encoder(rng: Rng, config: EncoderConfig) -> Params:
    """Starting parameters: weights from N(0, initializer_range²), float32."""
    width, std = config.hidden_size, config.initializer_range
    params: Params = {
        "embeddings": {
            "word": nn.init_embedding(rng, config.vocab_size, width, std),
            "position": nn.init_embedding(rng, config.max_position_embeddings, width, std),
            "type": nn.init_embedding(rng, config.type_vocab_size, width, std),
            "norm": nn.init_layer_norm(width),
        },
        "blocks": {
            str(n): nn.init_encoder_block(rng, width, config.intermediate_size, std)
            for n in range(config.num_hidden_layers)
        },
    }
    if config.norm_first:
        params["norm"] = nn.init_layer_norm(width)
    return params


def encode(
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
        dhidden -> (dparams, an empty array: ids have no gradient).

    Raises
    ------
    ValueError
        For an id outside the vocabulary or a sequence longer than max_position_embeddings.
    """
    _check_tokens(config, ids, cu_seqlens)
    eps, p = config.layer_norm_eps, config.hidden_dropout_prob
    tables = params["embeddings"]
    lengths = np.diff(cu_seqlens)
    positions = np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], lengths)

    x, word_vjp = nn.embedding(tables["word"], ids)
    position, position_vjp = nn.embedding(tables["position"], positions)
    kind, kind_vjp = nn.embedding(tables["type"], np.zeros(len(ids), np.int64))
    x += position
    x += kind
    x, norm_vjp = nn.layer_norm(tables["norm"], x, eps)
    x, drop_vjp = nn.dropout({}, x, p, rng)

    block_vjps: dict[str, VJP] = {}
    for name, block in params["blocks"].items():
        x, block_vjps[name] = nn.encoder_block(
            block,
            x,
            cu_seqlens,
            config.num_attention_heads,
            norm_first=config.norm_first,
            activation=config.hidden_act,
            eps=eps,
            p=p,
            rng=rng,
        )
    if config.norm_first:
        x, last_vjp = nn.layer_norm(params["norm"], x, eps)

    def vjp(dx: Array) -> tuple[Params, Array]:
        grads: Params = {"embeddings": {}, "blocks": {}}
        if config.norm_first:
            grads["norm"], dx = last_vjp(dx)
        for name in reversed(block_vjps):
            grads["blocks"][name], dx = block_vjps[name](dx)
        grads["embeddings"]["norm"], dx = norm_vjp(drop_vjp(dx)[1])
        grads["embeddings"]["word"], nothing = word_vjp(dx)
        grads["embeddings"]["position"], _ = position_vjp(dx)
        grads["embeddings"]["type"], _ = kind_vjp(dx)
        return grads, nothing

    return x, vjp


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

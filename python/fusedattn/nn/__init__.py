"""Layers: ``y, vjp = layer(params, x, ...)`` and ``dparams, dx = vjp(dy)``.

Parameters are plain nested dicts of arrays. A layer holds no state, changes neither its parameters
nor its inputs, and computes in the dtype of its input (float32 to use it, float64 to check it).

Parameters that are `Frozen` get no gradients, {} in their place, and none are made.

A layer of two inputs, `cross_attention` say, gives the gradients of both: ``dparams, dx, dmemory``.

A batch is packed: its tokens lie end to end in x (T, width), and ``cu_seqlens`` (N + 1,) says where
each of the N sequences begins and ends. No layer ever sees padding.

To add a layer, add one file that defines the function of the file's name, import it here, and list
its options in ``tests/layer_cases.py``: tests fail until they are there, then check its gradients.
"""

from fusedattn.nn._frozen import Frozen, freezing, learns
from fusedattn.nn._shapes import draw
from fusedattn.nn._tree import flatten, leaves, map_leaves, unflatten
from fusedattn.nn._types import VJP, VJP2, Array, Params, Rng, Shapes
from fusedattn.nn.cls_pool import cls_pool
from fusedattn.nn.cross_attention import (
    cross_attention,
    cross_attention_shapes,
    init_cross_attention,
)
from fusedattn.nn.dropout import dropout
from fusedattn.nn.embedding import embedding, embedding_shapes, init_embedding
from fusedattn.nn.encoder_block import encoder_block, encoder_block_shapes, init_encoder_block
from fusedattn.nn.feed_forward import (
    ACTIVATIONS,
    feed_forward,
    feed_forward_shapes,
    init_feed_forward,
)
from fusedattn.nn.gelu import gelu
from fusedattn.nn.gelu_tanh import gelu_tanh
from fusedattn.nn.layer_norm import init_layer_norm, layer_norm, layer_norm_shapes
from fusedattn.nn.linear import init_linear, linear, linear_shapes
from fusedattn.nn.masked_lm_head import init_masked_lm_head, masked_lm_head, masked_lm_head_shapes
from fusedattn.nn.max_pool import max_pool
from fusedattn.nn.mean_pool import mean_pool
from fusedattn.nn.relu import relu
from fusedattn.nn.self_attention import init_self_attention, self_attention, self_attention_shapes
from fusedattn.nn.tanh import tanh
from fusedattn.nn.token_embedding import (
    init_token_embedding,
    token_embedding,
    token_embedding_shapes,
)

# By the names that a configuration gives them.
POOLINGS = {"mean": mean_pool, "cls": cls_pool, "max": max_pool}

__all__ = [
    "ACTIVATIONS",
    "POOLINGS",
    "VJP",
    "VJP2",
    "Array",
    "Frozen",
    "Params",
    "Rng",
    "Shapes",
    "cls_pool",
    "cross_attention",
    "cross_attention_shapes",
    "draw",
    "dropout",
    "embedding",
    "embedding_shapes",
    "encoder_block",
    "encoder_block_shapes",
    "feed_forward",
    "feed_forward_shapes",
    "flatten",
    "freezing",
    "gelu",
    "gelu_tanh",
    "init_cross_attention",
    "init_embedding",
    "init_encoder_block",
    "init_feed_forward",
    "init_layer_norm",
    "init_linear",
    "init_masked_lm_head",
    "init_self_attention",
    "init_token_embedding",
    "layer_norm",
    "layer_norm_shapes",
    "learns",
    "leaves",
    "linear",
    "linear_shapes",
    "map_leaves",
    "masked_lm_head",
    "masked_lm_head_shapes",
    "max_pool",
    "mean_pool",
    "relu",
    "self_attention",
    "self_attention_shapes",
    "tanh",
    "token_embedding",
    "token_embedding_shapes",
    "unflatten",
]

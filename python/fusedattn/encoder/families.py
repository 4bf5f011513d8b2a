"""BERT's family: what the folders of each member call the things that are the same in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one member's folders are written.

    Attributes
    ----------
    prefix : str
        What stands before the encoder's names in the folder of a model with a head.
    classes : dict
        The classes of `transformers` for "encoder", "classifier" and "masked_lm".
    names : dict
        The names of parameters, ours to the folder's; {n} is the number of a block.
    keys : dict
        The keys of config.json that differ, ours to the folder's.
    fixed : dict
        What is so in every model of this family and is not said in its config.json.
    positions_after_padding : bool
        Whether a text's first token is at position pad_token_id + 1 instead of 0.
    pooler_act, head_act : str
        The activations inside a classification head and, where it is not the encoder's own, inside
        a masked-language-model head.
    """

    prefix: str
    classes: Mapping[str, str]
    names: Mapping[str, str]
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    positions_after_padding: bool = False
    pooler_act: str = "tanh"
    head_act: str | None = None


def _classes(name: str) -> dict[str, str]:
    return {
        "encoder": f"{name}Model",
        "classifier": f"{name}ForSequenceClassification",
        "masked_lm": f"{name}ForMaskedLM",
    }


# The encoder's own names begin with "encoder.", a head's do not.
_EMBEDDINGS = {
    "encoder.embeddings.word": "embeddings.word_embeddings",
    "encoder.embeddings.position": "embeddings.position_embeddings",
    "encoder.embeddings.norm": "embeddings.LayerNorm",
}
_BERT = {
    **_EMBEDDINGS,
    "encoder.embeddings.type": "embeddings.token_type_embeddings",
    "encoder.blocks.{n}.attention.q": "encoder.layer.{n}.attention.self.query",
    "encoder.blocks.{n}.attention.k": "encoder.layer.{n}.attention.self.key",
    "encoder.blocks.{n}.attention.v": "encoder.layer.{n}.attention.self.value",
    "encoder.blocks.{n}.attention.out": "encoder.layer.{n}.attention.output.dense",
    "encoder.blocks.{n}.attention_norm": "encoder.layer.{n}.attention.output.LayerNorm",
    "encoder.blocks.{n}.feed_forward.up": "encoder.layer.{n}.intermediate.dense",
    "encoder.blocks.{n}.feed_forward.down": "encoder.layer.{n}.output.dense",
    "encoder.blocks.{n}.feed_forward_norm": "encoder.layer.{n}.output.LayerNorm",
}
_BERT_HEADS = {
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
}
_ROBERTA_HEADS = {
    "pooler": "classifier.dense",
    "classifier": "classifier.out_proj",
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head": "lm_head",
}
_PRE_NORM = {
    **_BERT,
    "encoder.blocks.{n}.attention_norm": "encoder.layer.{n}.attention.LayerNorm",
    "encoder.blocks.{n}.feed_forward_norm": "encoder.layer.{n}.intermediate.LayerNorm",
    "encoder.norm": "LayerNorm",
}
_DISTILBERT = {
    **_EMBEDDINGS,
    "encoder.blocks.{n}.attention.q": "transformer.layer.{n}.attention.q_lin",
    "encoder.blocks.{n}.attention.k": "transformer.layer.{n}.attention.k_lin",
    "encoder.blocks.{n}.attention.v": "transformer.layer.{n}.attention.v_lin",
    "encoder.blocks.{n}.attention.out": "transformer.layer.{n}.attention.out_lin",
    "encoder.blocks.{n}.attention_norm": "transformer.layer.{n}.sa_layer_norm",
    "encoder.blocks.{n}.feed_forward.up": "transformer.layer.{n}.ffn.lin1",
    "encoder.blocks.{n}.feed_forward.down": "transformer.layer.{n}.ffn.lin2",
    "encoder.blocks.{n}.feed_forward_norm": "transformer.layer.{n}.output_layer_norm",
    "pooler": "pre_classifier",
    "classifier": "classifier",
    "head.dense": "vocab_transform",
    "head.norm": "vocab_layer_norm",
    "head": "vocab_projector",
}

# By the model_type of config.json.
FAMILIES = {
    "bert": Family("bert.", _classes("Bert"), _BERT | _BERT_HEADS),
    "roberta": Family(
        "roberta.",
        _classes("Roberta"),
        _BERT | _ROBERTA_HEADS,
        positions_after_padding=True,
        head_act="gelu",
    ),
    "roberta-prelayernorm": Family(
        "roberta_prelayernorm.",
        _classes("RobertaPreLayerNorm"),
        _PRE_NORM | _ROBERTA_HEADS,
        positions_after_padding=True,
        head_act="gelu",
    ),
    "distilbert": Family(
        "distilbert.",
        _classes("DistilBert"),
        _DISTILBERT,
        keys={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12},
        pooler_act="relu",
    ),
}

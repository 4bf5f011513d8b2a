"""The shape of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fusedattn import nn
from fusedattn.encoder.families import FAMILIES, Family

# config.json's fields that change what a BERT computes: what an encoder here can be.
_ONLY = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
# The smallest number that makes sense; an encoder of no blocks is a bag of words.
_AT_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 1,
    "type_vocab_size": 0,
}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, under the names of BERT's config.json where it has one.

    Attributes
    ----------
    vocab_size : int
    hidden_size : int, default 128
        The width, a multiple of `num_attention_heads`.
    num_hidden_layers : int, default 2
    num_attention_heads : int, default 4
    intermediate_size : int, default 512
        The inner width of the feed-forward layers.
    hidden_act : str, default "gelu"
        A key of `fusedattn.nn.ACTIVATIONS`.
    hidden_dropout_prob, attention_probs_dropout_prob : float, default 0.1 and 0
        In training: dropout of embeddings, of what each block adds and before a classifier; and of
        attention's probabilities.
    max_position_embeddings : int, default 512
        The longest sequence. (A RoBERTa's config.json counts `pad_token_id` + 1 more.)
    type_vocab_size : int, default 2
        Token types; a single text is all of type 0. With 0 there is no such table (DistilBERT).
    layer_norm_eps : float, default 1e-12
    initializer_range : float, default 0.02
        Standard deviation of the starting weights.
    norm_first : bool, default False
        Pre-norm blocks with a layer norm after the last, instead of BERT's post-norm.
    model_type : str, default "bert"
        Whose names a folder has: a key of `fusedattn.encoder.families.FAMILIES`. With `norm_first`
        it is always "roberta-prelayernorm", and only then.
    pad_token_id : int, default 0
        Packed batches hold no padding; `transformers` asks for it.
    """

    vocab_size: int
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    norm_first: bool = False
    model_type: str = "bert"
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.norm_first and self.model_type == "bert":
            object.__setattr__(self, "model_type", "roberta-prelayernorm")
        if self.model_type not in FAMILIES:
            known = sorted(FAMILIES)
            raise ValueError(f"model_type: expected one of {known}, got {self.model_type!r}")
        if self.norm_first != (self.model_type == "roberta-prelayernorm"):
            raise ValueError(
                f"norm_first: expected {not self.norm_first} with model_type {self.model_type!r}, "
                f"got {self.norm_first}"
            )
        for key, value in self.family.fixed.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"{key}: expected {value} with model_type {self.model_type!r}, "
                    f"got {getattr(self, key)}"
                )
        for key, least in _AT_LEAST.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key}: expected at least {least}, got {getattr(self, key)}")
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(
                    f"{key}: expected a probability in [0, 1), got {getattr(self, key)}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.hidden_act not in nn.ACTIVATIONS:
            known = sorted(nn.ACTIVATIONS)
            raise ValueError(f"hidden_act: expected one of {known}, got {self.hidden_act!r}")

    @property
    def family(self) -> Family:
        """How folders of this kind of model name and lay out what is here."""
        return FAMILIES[self.model_type]

    @property
    def unused_positions(self) -> int:
        """Rows of a folder's position table before that of a text's first token."""
        return self.pad_token_id + 1 if self.family.positions_after_padding else 0

    @property
    def head_act(self) -> str:
        """The activation inside a masked-language-model head."""
        return self.family.head_act or self.hidden_act

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EncoderConfig:
        """Read a config.json's content; what an encoder does not use is passed over.

        Raises
        ------
        ValueError
            For another architecture, or a variant that an `Encoder` does not compute.
        """
        model_type = content.get("model_type", "bert")
        if model_type not in FAMILIES:
            known = sorted(FAMILIES)
            raise ValueError(f"model_type: expected one of {known}, got {model_type!r}")
        for key, value in _ONLY.items():
            if content.get(key, value) != value:
                raise ValueError(f"{key}: expected {value!r}, got {content[key]!r}")
        family = FAMILIES[model_type]
        values: dict[str, Any] = dict(family.fixed)
        for field in fields(cls):
            key = family.keys.get(field.name, field.name)
            if content.get(key) is not None:
                values[field.name] = content[key]
        if "vocab_size" not in values:
            raise ValueError("vocab_size: expected one in config.json, there is none")
        if model_type == "roberta-prelayernorm":
            values["norm_first"] = True
        if family.positions_after_padding and "max_position_embeddings" in values:
            values["max_position_embeddings"] -= values.get("pad_token_id", 0) + 1
        return cls(**values)

    def to_dict(self, model: str) -> dict[str, Any]:
        """The content of a config.json, such that `from_dict` gives this back.

        Parameters
        ----------
        model : str
            What the folder holds: "encoder", "classifier" or "masked_lm".
        """
        keys = self.family.keys
        content: dict[str, Any] = {"architectures": [self.family.classes[model]]}
        for field in fields(self):
            if field.name != "norm_first" and field.name not in self.family.fixed:
                content[keys.get(field.name, field.name)] = getattr(self, field.name)
        content["max_position_embeddings"] += self.unused_positions
        return content

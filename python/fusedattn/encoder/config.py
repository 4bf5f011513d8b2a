"""The shape of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fusedattn import nn


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
    hidden_dropout_prob : float, default 0.1
    max_position_embeddings : int, default 512
        The longest sequence.
    type_vocab_size : int, default 2
        Token types; a single text is all of type 0.
    layer_norm_eps : float, default 1e-12
    initializer_range : float, default 0.02
        Standard deviation of the starting weights.
    norm_first : bool, default False
        Pre-norm blocks with a layer norm after the last, instead of BERT's post-norm. Not BERT's.
    """

    vocab_size: int
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    norm_first: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.hidden_act not in nn.ACTIVATIONS:
            known = sorted(nn.ACTIVATIONS)
            raise ValueError(f"hidden_act: expected one of {known}, got {self.hidden_act!r}")

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> EncoderConfig:
        """Read a config.json's content; what an encoder does not use is passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in known})

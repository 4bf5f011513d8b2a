"""A Transformer encoder over packed sequences, and the heads on top of it."""

from fusedattn.encoder.config import EncoderConfig
from fusedattn.encoder.layers import encoder_shapes, hidden_states, infer, init_encoder
from fusedattn.encoder.masked_lm import MaskedLM
from fusedattn.encoder.model import Encoder
from fusedattn.encoder.text_classifier import TextClassifier

__all__ = [
    "Encoder",
    "EncoderConfig",
    "MaskedLM",
    "TextClassifier",
    "encoder_shapes",
    "hidden_states",
    "infer",
    "init_encoder",
]

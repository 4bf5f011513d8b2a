"""A Transformer encoder over packed sequences, and the heads on top of it."""

from fusedattn.encoder.config import EncoderConfig
from fusedattn.encoder.layers import encode, init_encoder
from fusedattn.encoder.model import Encoder
from fusedattn.encoder.text_classifier import TextClassifier

__all__ = ["Encoder", "EncoderConfig", "TextClassifier", "encode", "init_encoder"]

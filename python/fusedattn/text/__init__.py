"""Text to packed batches: tokenizers, data sets, batches filled by token budget, word vectors."""

from fusedattn.text.batches import Batch, Dataset, fill_batches, pack
from fusedattn.text.cooccurrence import cooccurrence_embeddings
from fusedattn.text.masking import IGNORE, Masking, hide_tokens
from fusedattn.text.readers import Examples, label_names, read_examples
from fusedattn.text.split import split_examples
from fusedattn.text.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    special_ids,
    tokenize,
    tokenize_pieces,
    train_tokenizer,
)

__all__ = [
    "IGNORE",
    "SPECIAL_TOKENS",
    "Batch",
    "Dataset",
    "Examples",
    "Masking",
    "cooccurrence_embeddings",
    "fill_batches",
    "hide_tokens",
    "label_names",
    "load_tokenizer",
    "pack",
    "read_examples",
    "special_ids",
    "split_examples",
    "tokenize",
    "tokenize_pieces",
    "train_tokenizer",
]

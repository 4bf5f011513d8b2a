"""Text to packed batches: tokenizers, data sets, batches filled by token budget, word vectors."""

from fusedattn.text.batches import Batch, Dataset, fill_batches, hide_tokens, pack
from fusedattn.text.cooccurrence import cooccurrence_embeddings
from fusedattn.text.masking import IGNORE, Masking
from fusedattn.text.tokenizer import (
    SPECIAL_TOKENS,
    load_tokenizer,
    special_ids,
    tokenize,
    train_tokenizer,
)

__all__ = [
    "IGNORE",
    "SPECIAL_TOKENS",
    "Batch",
    "Dataset",
    "Masking",
    "cooccurrence_embeddings",
    "fill_batches",
    "hide_tokens",
    "load_tokenizer",
    "pack",
    "special_ids",
    "tokenize",
    "train_tokenizer",
]

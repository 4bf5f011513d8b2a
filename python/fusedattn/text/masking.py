"""Hidden tokens: those that a masked language model predicts, and those dropped as noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fusedattn.nn import Array, Rng
from fusedattn.text.batches import Batch
from fusedattn.text.tokenizer import mask_id, special_ids

IGNORE = -100  # the label of a token that is not to be predicted


class Masking:
    """Chooses tokens to predict as BERT does (arXiv:1810.04805): ``masking(batch, rng)``.

    Of the tokens that are not special, a share is chosen; of these 80 % become [MASK], 10 % a
    random token and 10 % stay. At least one is chosen where there are any.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        One that has a [MASK] (or <mask>).
    share : float, default 0.15
    whole_word : bool, default False
        Choose all of a word's pieces or none. Words are what the tokenizer splits further: where it
        splits Chinese into characters, each is a word.
    """

    def __init__(self, tokenizer: Any, share: float = 0.15, whole_word: bool = False) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: expected a value in (0, 1], got {share}")
        vocabulary = tokenizer.get_vocab()
        self.mask_id = mask_id(tokenizer)
        self.share = share
        size = max(vocabulary.values()) + 1
        self._special = np.zeros(size, bool)
        self._special[special_ids(tokenizer)] = True
        self._plain = np.flatnonzero(~self._special)
        self._inside = _continues_a_word(vocabulary, size) if whole_word else np.zeros(size, bool)
        self._inside &= ~self._special

    def __call__(self, batch: Batch, rng: Rng) -> Batch:
        """The batch with tokens hidden, and labels (T,): the hidden token's id, or `IGNORE`."""
        ids, special = batch.ids, self._special[batch.ids]
        begins = ~self._inside[ids]
        begins[batch.cu_seqlens[:-1][np.diff(batch.cu_seqlens) > 0]] = True
        word = np.cumsum(begins) - 1
        chosen = (rng.random(int(begins.sum())) < self.share)[word] & ~special
        if not chosen.any() and not special.all():
            chosen = (word == word[rng.choice(np.flatnonzero(~special))]) & ~special
        labels = np.where(chosen, ids, IGNORE).astype(np.int64)
        fate = rng.random(len(ids))
        hidden = np.where(chosen & (fate < 0.8), self.mask_id, ids)
        other = rng.choice(self._plain, len(ids))
        hidden = np.where(chosen & (fate >= 0.8) & (fate < 0.9), other, hidden)
        return replace(batch, ids=hidden.astype(ids.dtype), labels=labels)


def _continues_a_word(vocabulary: dict[str, int], size: int) -> Array:
    """Which ids stand inside a word: by WordPiece's ## or by the sign of BPE and unigram models."""
    inside = np.zeros(size, bool)
    if any(token.startswith("##") for token in vocabulary):
        inside[[i for token, i in vocabulary.items() if token.startswith("##")]] = True
    elif any(token.startswith(("Ġ", "▁")) for token in vocabulary):
        inside[[i for t, i in vocabulary.items() if not t.startswith(("Ġ", "▁"))]] = True
    return inside


def hide_tokens(batch: Batch, share: float, tokenizer: Any, rng: Rng) -> Batch:
    """The batch with each token replaced by [MASK] by chance: dropout of words.

    Parameters
    ----------
    batch : Batch
    share : float
        The chance of each token that is not special.
    tokenizer : tokenizers.Tokenizer
        One that has a [MASK] (or <mask>).
    rng : numpy.random.Generator
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share: expected a value in [0, 1), got {share}")
    hidden = rng.random(len(batch.ids), dtype=np.float32) < share
    hidden &= ~np.isin(batch.ids, special_ids(tokenizer))
    mask = batch.ids.dtype.type(mask_id(tokenizer))
    return replace(batch, ids=np.where(hidden, mask, batch.ids))

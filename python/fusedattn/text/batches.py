"""Labelled token ids, and packed batches of them filled by token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedattn.nn import Array, Rng
from fusedattn.text.tokenizer import tokenize


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end.

    Attributes
    ----------
    ids : int32 array (T,)
    cu_seqlens : int32 array (N + 1,)
        Sequence n is ids[cu_seqlens[n]:cu_seqlens[n + 1]].
    labels : int array (N,) or (T,)
        One a sequence, or one a token; empty where there are none.
    """

    ids: Array
    cu_seqlens: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1


def pack(sequences: Sequence[Array], labels: Array | None = None) -> Batch:
    """Lay sequences of token ids end to end."""
    cu_seqlens = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([len(s) for s in sequences], out=cu_seqlens[1:])
    ids = np.concatenate(sequences) if sequences else np.empty(0, np.int32)
    return Batch(ids, cu_seqlens, np.empty(0, np.int64) if labels is None else labels)


def fill_batches(
    lengths: Sequence[int], max_tokens: int, max_sentences: int, rng: Rng | None = None
) -> list[list[int]]:
    """Divide sequences among batches, each as full as the two limits allow.

    Where nothing is padded, sentences of unlike length share a batch at no cost: a shuffled order
    is taken as it comes, not sorted by length.

    Parameters
    ----------
    lengths : sequence of int
        The number of tokens of each sequence.
    max_tokens, max_sentences : int
        What a batch may hold. A longer sequence is a batch alone.
    rng : numpy.random.Generator, optional
        Shuffles the sequences first; without it they stay in order.

    Returns
    -------
    list of list of int
        The indices of the sequences of each batch.
    """
    if max_tokens < 1 or max_sentences < 1:
        raise ValueError(
            f"max_tokens, max_sentences: expected at least 1, got {max_tokens}, {max_sentences}"
        )
    order = range(len(lengths)) if rng is None else rng.permutation(len(lengths)).tolist()
    batches: list[list[int]] = []
    tokens = 0
    for i in order:
        full = tokens + lengths[i] > max_tokens or (batches and len(batches[-1]) >= max_sentences)
        if not batches or full:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


@dataclass(frozen=True)
class Dataset:
    """Token ids and labels of a set of texts.

    Attributes
    ----------
    sequences : list of int32 arrays
    labels : int array (number of sequences,), optional
        Left out, batches have no labels.
    """

    sequences: list[Array]
    labels: Array | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.sequences) != len(self.labels):
            raise ValueError(
                f"labels: expected one for each of {len(self.sequences)} sequences, "
                f"got {len(self.labels)}"
            )

    @classmethod
    def from_texts(
        cls, tokenizer: Any, texts: Sequence[str], labels: Sequence[str], names: Sequence[str]
    ) -> Dataset:
        """Tokenize `texts`, and number `labels` by their place in `names`."""
        place = {name: i for i, name in enumerate(names)}
        unknown = sorted(set(labels) - set(place))
        if unknown:
            raise ValueError(f"labels: expected names among {list(names)}, got {unknown}")
        return cls(tokenize(tokenizer, texts), np.array([place[label] for label in labels], int))

    def __len__(self) -> int:
        return len(self.sequences)

    def batches(
        self, max_tokens: int, max_sentences: int, rng: Rng | None = None
    ) -> Iterator[Batch]:
        """Yield every sequence once, in the batches of `fill_batches`."""
        lengths = [len(s) for s in self.sequences]
        for chosen in fill_batches(lengths, max_tokens, max_sentences, rng):
            labels = None if self.labels is None else self.labels[chosen]
            yield pack([self.sequences[i] for i in chosen], labels)

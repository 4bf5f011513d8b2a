"""Text to packed batches: tokenizers, data sets, batches filled by token budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedattn.nn import Array, Rng

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# BERT's, in the order of its vocabulary file.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = True, max_length: int = 512
) -> Tokenizer:
    """Train a WordPiece tokenizer that treats text as BERT's does.

    The pieces are the most frequent ones of a byte-pair encoding (arXiv:1508.07909) of the texts,
    whose training, unlike the library's for WordPiece, ends the same way every time.

    Parameters
    ----------
    texts : iterable of str
        What to learn the vocabulary from.
    vocab_size : int
        The largest number of tokens, special tokens included.
    lowercase : bool, default True
        Lower the case and strip accents.
    max_length : int, default 512
        Longer texts are cut to this many tokens, [CLS] and [SEP] included.

    Returns
    -------
    tokenizers.Tokenizer
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    pairs = Tokenizer(models.BPE())
    pairs.train_from_iterator(
        (word for word in sorted(words) for _ in range(words[word])),
        trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False),
    )
    letters: Counter[str] = Counter()
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        for i, letter in enumerate(word):
            letters["##" * (i > 0) + letter] += count
        for i, token in enumerate(pairs.model.tokenize(word)):
            pieces["##" * (i > 0) + token.value] += count
    # The letters first, so that few words are unknown; the commonest before the rarer.
    order = [
        piece
        for counts in (letters, pieces - letters)
        for piece in sorted(counts, key=lambda p: (-counts[p], p))
    ]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *order][:vocab_size])}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.enable_truncation(max_length)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder."""
    from tokenizers import Tokenizer

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"path: expected a tokenizer.json, there is none at {file}")
    return Tokenizer.from_file(str(file))


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[Array]:
    """The token ids of each text, int32 arrays, with the special tokens of the tokenizer."""
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of str, got one str")
    return [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts))]


@dataclass(frozen=True)
class Batch:
    """Sequences laid end to end.

    Attributes
    ----------
    ids : int32 array (T,)
    cu_seqlens : int32 array (N + 1,)
        Sequence n is ids[cu_seqlens[n]:cu_seqlens[n + 1]].
    labels : int array (N,)
        Empty where there are none.
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
    labels : int array (number of sequences,)
    """

    sequences: list[Array]
    labels: Array

    def __post_init__(self) -> None:
        if len(self.sequences) != len(self.labels):
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
            yield pack([self.sequences[i] for i in chosen], self.labels[chosen])


def special_ids(tokenizer: Any) -> Array:
    """The ids of the special tokens of a tokenizer, int32."""
    added = tokenizer.get_added_tokens_decoder()
    return np.array([i for i, token in added.items() if token.special], np.int32)


def hide_tokens(batch: Batch, share: float, tokenizer: Any, rng: Rng) -> Batch:
    """The batch with each token replaced by [MASK] by chance: dropout of words.

    Parameters
    ----------
    batch : Batch
    share : float
        The chance of each token that is not special.
    tokenizer : tokenizers.Tokenizer
        One that has a [MASK].
    rng : numpy.random.Generator
    """
    hidden = rng.random(len(batch.ids), dtype=np.float32) < share
    hidden &= ~np.isin(batch.ids, special_ids(tokenizer))
    mask = batch.ids.dtype.type(tokenizer.token_to_id("[MASK]"))
    return replace(batch, ids=np.where(hidden, mask, batch.ids))


def cooccurrence_embeddings(
    sequences: Sequence[Array], vocab_size: int, width: int, *, window: int = 4, seed: int = 0
) -> Array:
    """Word vectors from counts of neighbours, to start an embedding from.

    The leading singular vectors of the positive pointwise mutual information of tokens at most
    `window` apart, neighbours at distance d counted 1/d and context counts smoothed by the power
    3/4 (Levy, Goldberg and Dagan, TACL 3, 2015), found by random projection (Halko, Martinsson and
    Tropp, SIAM Review 53, 2011). Takes seconds; needs some 16 * vocab_size² bytes while it runs.

    Parameters
    ----------
    sequences : sequence of int arrays
        Token ids; more text gives better vectors, and no labels are needed.
    vocab_size, width : int
        The shape of the result; columns beyond vocab_size are 0.
    window : int, default 4
    seed : int, default 0
        Of the projection, and of the vectors of tokens that have no neighbours.

    Returns
    -------
    float32 array (vocab_size, width)
        Rows of root-mean-square 1.
    """
    if vocab_size < 1 or width < 1:
        raise ValueError(f"vocab_size, width: expected at least 1, got {vocab_size}, {width}")
    rng = np.random.default_rng(seed)
    pairs, weights = [np.empty(0, np.int64)], [np.empty(0)]
    for distance in range(1, window + 1):
        for ids in (s.astype(np.int64) for s in sequences if len(s) > distance):
            pairs.append(ids[:-distance] * vocab_size + ids[distance:])
            weights.append(np.full(len(ids) - distance, 1.0 / distance))
    counts = np.bincount(np.concatenate(pairs), np.concatenate(weights), vocab_size**2)
    joint = counts.astype(np.float32).reshape(vocab_size, vocab_size)
    ppmi = joint + joint.T
    totals = np.maximum(ppmi.sum(axis=0), np.finfo(np.float32).tiny)
    context = totals**0.75
    context /= context.sum()
    # max(log(joint / (totals * context)), 0), and 0 where joint is 0
    ppmi /= totals[:, None]
    ppmi /= context
    np.log(np.maximum(ppmi, 1.0, out=ppmi), out=ppmi)

    basis = rng.standard_normal((vocab_size, min(vocab_size, width + 32)), dtype=np.float32)
    for _ in range(4):
        basis = _orthonormal(ppmi @ (ppmi.T @ basis))
    inside = ppmi.T @ basis
    values, turn = np.linalg.eigh(inside.T @ inside)  # squares of the singular values, ascending
    turn *= np.maximum(values, 0.0) ** 0.25
    vectors = np.zeros((vocab_size, width), np.float32)
    vectors[:, : turn.shape[1]] = basis @ turn[:, : -width - 1 : -1]
    alone = ~vectors.any(axis=1)
    vectors[alone] = rng.standard_normal((int(alone.sum()), width), dtype=np.float32)
    vectors /= np.sqrt(np.mean(vectors**2, axis=1, keepdims=True))
    return vectors


def _orthonormal(columns: Array) -> Array:
    """The same span by way of the Gram matrix: all BLAS products, unlike a QR of a tall matrix."""
    values, turn = np.linalg.eigh(columns.T @ columns)
    turn /= np.sqrt(np.maximum(values, np.finfo(values.dtype).eps * values[-1] + 1e-30))
    return columns @ turn  # type: ignore[no-any-return]

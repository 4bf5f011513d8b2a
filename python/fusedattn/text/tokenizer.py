"""Tokenizers: training, loading, and text to token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedattn.nn import Array

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# BERT's, in the order of its vocabulary file.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    max_length: int = 512,
    split_chinese: bool = True,
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
    split_chinese : bool, default True
        Make each Chinese character a word, as BERT does. Without it, what stands between two signs
        of punctuation is cut into frequent strings of characters, and so is any other word: pieces
        are the same at a word's beginning and inside it, without ##.

    Returns
    -------
    tokenizers.Tokenizer
    """
    if vocab_size <= len(SPECIAL_TOKENS) or max_length < 3:
        raise ValueError(
            f"vocab_size, max_length: expected more than the {len(SPECIAL_TOKENS)} special tokens "
            f"and at least 3, got {vocab_size} and {max_length}"
        )
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    normalizer = normalizers.BertNormalizer(lowercase=lowercase, handle_chinese_chars=split_chinese)
    inside = "##" if split_chinese else ""
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
            letters[inside * (i > 0) + letter] += count
        for i, token in enumerate(pairs.model.tokenize(word)):
            pieces[inside * (i > 0) + token.value] += count
    # The letters first, so that few words are unknown; the commonest before the rarer.
    order = [
        piece
        for counts in (letters, pieces - letters)
        for piece in sorted(counts, key=lambda p: (-counts[p], p))
    ]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *order][:vocab_size])}

    model = models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix=inside)
    if not split_chinese:
        model.max_input_chars_per_word = 1000  # a sentence may be one word
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece() if split_chinese else decoders.Fuse()
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
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected str, got {type(text).__name__} at {i}")
    return [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(list(texts))]


def tokenize_pieces(tokenizer: Any, texts: Sequence[str]) -> list[Array]:
    """Like `tokenize`, but what truncation cuts off follows as further sequences."""
    encodings = (tokenizer.encode(text) for text in texts)
    pieces = (piece for e in encodings for piece in (e, *e.overflowing))
    return [np.array(piece.ids, np.int32) for piece in pieces]


def mask_id(tokenizer: Any) -> int:
    """The id of [MASK], or of RoBERTa's <mask>; a ValueError where there is neither."""
    for token in ("[MASK]", "<mask>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return int(found)
    raise ValueError("tokenizer: expected one with a [MASK] token, this one has none")


def special_ids(tokenizer: Any) -> Array:
    """The ids of the special tokens of a tokenizer, int32."""
    added = tokenizer.get_added_tokens_decoder()
    return np.array([i for i, token in added.items() if token.special], np.int32)

"""Which tokens a masked language model is to predict, and what it is shown instead."""

import numpy as np
import pytest

from fusedattn.text import IGNORE, Masking, pack, special_ids, tokenize, train_tokenizer

pytest.importorskip("tokenizers", reason="masking asks the tokenizer for its special tokens")

TEXTS = ["parse the dates and reparse undated files", "三天之内 open files"] * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 40)  # few enough pieces that words are split


@pytest.fixture(scope="module")
def batch(tokenizer):
    return pack(tokenize(tokenizer, TEXTS * 20))


def test_shares(tokenizer, batch):
    masking = Masking(tokenizer)
    masked = masking(batch, np.random.default_rng(0))
    chosen = masked.labels != IGNORE
    plain = ~np.isin(batch.ids, special_ids(tokenizer))
    assert not (chosen & ~plain).any()
    np.testing.assert_array_equal(masked.labels[chosen], batch.ids[chosen])
    np.testing.assert_array_equal(masked.ids[~chosen], batch.ids[~chosen])
    assert masked.ids.dtype == batch.ids.dtype
    assert chosen.sum() / plain.sum() == pytest.approx(0.15, abs=0.01)
    hidden = masked.ids[chosen] == tokenizer.token_to_id("[MASK]")
    same = masked.ids[chosen] == batch.ids[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert same.mean() == pytest.approx(0.1, abs=0.02)
    other = masked.ids[chosen][~hidden & ~same]
    assert not np.isin(other, special_ids(tokenizer)).any()
    assert masking(batch, np.random.default_rng(0)).ids.tolist() == masked.ids.tolist()


def test_whole_words(tokenizer, batch):
    tokens = [tokenizer.id_to_token(int(i)) for i in batch.ids]
    inside = np.array([t.startswith("##") for t in tokens])
    assert inside.any()
    chosen = Masking(tokenizer, whole_word=True)(batch, np.random.default_rng(0)).labels != IGNORE
    np.testing.assert_array_equal(chosen[1:][inside[1:]], chosen[:-1][inside[1:]])
    assert chosen.mean() == pytest.approx(0.15 * 0.85, abs=0.03)
    pieces = Masking(tokenizer)(batch, np.random.default_rng(0)).labels != IGNORE
    assert (pieces[1:][inside[1:]] != pieces[:-1][inside[1:]]).any()


def test_chinese_words_are_characters(tokenizer, batch):
    masked = Masking(tokenizer, whole_word=True)(batch, np.random.default_rng(0))
    chosen = masked.labels[masked.labels != IGNORE]
    characters = [tokenizer.token_to_id(c) for c in "三天之内"]
    assert all(i in chosen for i in characters)
    first = tokenize(tokenizer, ["三天之内"])[0]
    np.testing.assert_array_equal(first[1:-1], characters)


def test_at_least_one_where_there_is_any(tokenizer):
    rng = np.random.default_rng(0)
    masking = Masking(tokenizer, share=1e-9)
    labels = masking(pack(tokenize(tokenizer, ["files"])), rng).labels
    assert (labels != IGNORE).any()
    assert (masking(pack(tokenize(tokenizer, ["", ""])), rng).labels == IGNORE).all()


def test_errors(tokenizer):
    with pytest.raises(ValueError, match=r"^share: expected a value in \(0, 1\], got 0"):
        Masking(tokenizer, share=0)
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match=r"^tokenizer: expected one with a \[MASK\]"):
        Masking(bare)

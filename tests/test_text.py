"""Tokenizers, packing, batches by budget."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fusedattn.text import (
    Batch,
    Dataset,
    cooccurrence_embeddings,
    fill_batches,
    hide_tokens,
    load_tokenizer,
    pack,
    special_ids,
    tokenize,
    train_tokenizer,
)

pytest.importorskip("tokenizers", reason="text needs tokenizers")

TEXTS = ["Open the file and read it.", "Close the file.", "Parse a date from a string, and more."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 120, max_length=12)


def test_tokens_are_berts(tokenizer):
    (ids,) = tokenize(tokenizer, ["CLOSE the file."])
    tokens = [tokenizer.id_to_token(i) for i in ids.tolist()]
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert tokenizer.decode(ids.tolist()) == "close the file."
    assert ids.dtype == np.int32


def test_same_texts_same_vocabulary():
    """In another process too, where hashes of strings differ."""
    code = (
        "from fusedattn.text import train_tokenizer; "
        f"print(train_tokenizer({TEXTS!r} * 3, 60, max_length=12).to_str())"
    )
    here = train_tokenizer(TEXTS * 3, 60, max_length=12).to_str()
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert there.stdout.strip() == here


def test_words_of_known_letters_are_not_unknown(tokenizer):
    (ids,) = tokenize(tokenizer, ["real files"])
    assert tokenizer.token_to_id("[UNK]") not in ids
    assert tokenizer.token_to_id("[UNK]") in tokenize(tokenizer, ["ж"])[0]


def test_vocabulary_is_bounded_and_length_is_cut(tokenizer):
    assert tokenizer.get_vocab_size() <= 120
    (ids,) = tokenize(tokenizer, ["read " * 100])
    assert len(ids) == 12
    assert tokenizer.id_to_token(int(ids[-1])) == "[SEP]"


@pytest.mark.parametrize("limits", [{"vocab_size": 5}, {"vocab_size": 60, "max_length": 2}])
def test_a_tokenizer_has_room_for_more_than_special_tokens(limits):
    with pytest.raises(ValueError, match=r"^vocab_size, max_length: expected more than the 5"):
        train_tokenizer(["words"], **limits)


def test_empty_text_still_has_its_ends(tokenizer):
    (ids,) = tokenize(tokenizer, [""])
    assert [tokenizer.id_to_token(i) for i in ids.tolist()] == ["[CLS]", "[SEP]"]


def test_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        np.testing.assert_equal(tokenize(load_tokenizer(path), TEXTS), tokenize(tokenizer, TEXTS))


def test_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^path: expected a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_one_string_is_not_a_sequence_of_texts(tokenizer):
    with pytest.raises(TypeError, match=r"^texts: expected a sequence of str, got one str"):
        tokenize(tokenizer, "abc")
    with pytest.raises(TypeError, match=r"^texts: expected str, got int at 1"):
        tokenize(tokenizer, ["abc", 3])


def test_pack_lays_end_to_end():
    sequences = [np.array(s, np.int32) for s in ([1, 2, 3], [], [4])]
    batch = pack(sequences, np.array([5, 6, 7]))
    np.testing.assert_array_equal(batch.ids, [1, 2, 3, 4])
    np.testing.assert_array_equal(batch.cu_seqlens, [0, 3, 3, 4])
    np.testing.assert_array_equal(batch.labels, [5, 6, 7])
    assert len(batch) == 3
    assert len(pack([])) == 0


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_batches_respect_both_limits_and_lose_nothing(rng):
    lengths = np.random.default_rng(1).integers(1, 40, 200).tolist()
    batches = fill_batches(lengths, 100, 6, rng)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        tokens = sum(lengths[i] for i in batch)
        assert tokens <= 100
        assert len(batch) <= 6
        if following is not None:  # as full as the limits allow
            assert len(batch) == 6 or tokens + lengths[following[0]] > 100


def test_order_of_batches():
    lengths = [3] * 50
    in_order = [i for batch in fill_batches(lengths, 9, 9) for i in batch]
    assert in_order == list(range(50))
    first, again, other = (
        fill_batches(lengths, 9, 9, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert first[0] != [0, 1, 2]


def test_sequence_over_the_budget_is_alone():
    assert fill_batches([2, 50, 2], 10, 10) == [[0], [1], [2]]
    assert fill_batches([50, 2, 2], 10, 10) == [[0], [1, 2]]
    assert fill_batches([], 10, 10) == []


def test_batch_limits_are_checked():
    with pytest.raises(ValueError, match=r"^max_tokens, max_sentences: expected at least 1"):
        fill_batches([1], 0, 1)


def test_dataset_numbers_its_labels(tokenizer):
    data = Dataset.from_texts(tokenizer, TEXTS, ["b", "a", "b"], ["a", "b"])
    np.testing.assert_array_equal(data.labels, [1, 0, 1])
    (batch,) = data.batches(1000, 10)
    np.testing.assert_array_equal(batch.labels, [1, 0, 1])
    np.testing.assert_array_equal(batch.ids, np.concatenate(tokenize(tokenizer, TEXTS)))


def test_dataset_errors(tokenizer):
    with pytest.raises(ValueError, match=r"^labels: expected names among \['a'\], got \['c'\]"):
        Dataset.from_texts(tokenizer, TEXTS, ["a", "c", "a"], ["a"])
    with pytest.raises(ValueError, match=r"^labels: expected one for each of 1 sequences, got 0"):
        Dataset([np.array([1])], np.array([]))


def test_hidden_tokens(tokenizer):
    mask = tokenizer.token_to_id("[MASK]")
    ids = np.concatenate(tokenize(tokenizer, TEXTS * 200))
    batch = Batch(ids, np.array([0, len(ids)]), np.array([0]))
    hidden = hide_tokens(batch, 0.3, tokenizer, np.random.default_rng(0))
    special = np.isin(ids, special_ids(tokenizer))
    assert special.any()
    np.testing.assert_array_equal(hidden.ids[special], ids[special])
    changed = hidden.ids != ids
    assert set(hidden.ids[changed].tolist()) == {mask}
    assert abs(changed[~special].mean() - 0.3) < 0.02
    assert not np.isin(batch.ids, mask).any()  # the batch given is unchanged
    with pytest.raises(ValueError, match=r"^share: expected a value in \[0, 1\), got 1.5"):
        hide_tokens(batch, 1.5, tokenizer, np.random.default_rng(0))


def test_cooccurrence_brings_tokens_of_the_same_neighbours_together():
    """Tokens 0-4 live among 10-14, tokens 5-9 among 15-19; 20 is never met."""
    rng = np.random.default_rng(0)
    sequences = []
    for topic in rng.integers(0, 2, 400).tolist():
        tokens = np.empty(8, np.int32)
        tokens[0::2] = rng.integers(0, 5, 4) + 5 * topic
        tokens[1::2] = rng.integers(10, 15, 4) + 5 * topic
        sequences.append(tokens)
    vectors = cooccurrence_embeddings(sequences, 21, 6)
    assert vectors.shape == (21, 6)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.mean(vectors**2, axis=1), 1, rtol=1e-5)
    cosine = vectors @ vectors.T / 6
    within = min(cosine[:5, :5].min(), cosine[5:10, 5:10].min())
    assert within > 0.5 > cosine[:5, 5:10].max() + 0.2
    np.testing.assert_array_equal(cooccurrence_embeddings(sequences, 21, 6), vectors)


def test_cooccurrence_with_nothing_to_count():
    vectors = cooccurrence_embeddings([np.array([1], np.int32)], 4, 4)
    assert np.isfinite(vectors).all()
    assert cooccurrence_embeddings([np.array([1, 2, 1])], 4, 7).shape == (4, 7)
    with pytest.raises(ValueError, match=r"^vocab_size, width: expected at least 1, got 4, 0"):
        cooccurrence_embeddings([], 4, 0)


def test_chinese_characters_or_strings_of_them():
    rng = np.random.default_rng(0)
    words = ["明天", "天气", "股市", "电影", "ok"]
    texts = ["".join(rng.choice(words, 4)) + "。" for _ in range(100)]
    characters = train_tokenizer(texts, 100).encode("明天天气").tokens
    assert characters == ["[CLS]", "明", "天", "天", "气", "[SEP]"]
    strings = train_tokenizer(texts, 20, split_chinese=False)
    assert strings.encode("明天天气").tokens == ["[CLS]", "明天", "天气", "[SEP]"]
    assert strings.encode("天气明天").tokens == [
        "[CLS]",
        "天气",
        "明天",
        "[SEP]",
    ]  # the same pieces
    assert strings.decode(strings.encode("股市明天ok").ids) == "股市明天ok"
    assert strings.token_to_id("[UNK]") not in strings.encode("股市" * 200).ids

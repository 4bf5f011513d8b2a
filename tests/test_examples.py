"""The examples: each runs in small, and computes what it says."""

import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fusedattn.nn import flatten, unflatten

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="runs what a checkout has")


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_gradients(params, forward, rng):
    """Of the sum of forward()'s outputs, weighed at random, along a random direction each."""
    outputs, vjp = forward()
    weights = rng.standard_normal(outputs.shape)
    grads = flatten(vjp(weights)[0])
    assert grads.keys() == flatten(params).keys()
    for name, p in flatten(params).items():
        direction, kept, values = rng.standard_normal(p.shape), p.copy(), []
        for step in (1e-5, -1e-5):
            p[...] = kept + step * direction
            values.append(float(np.vdot(forward()[0], weights)))
        p[...] = kept
        slope = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(
            np.vdot(grads[name], direction), slope, rtol=1e-5, atol=1e-7, err_msg=name
        )


def widen(params):
    return unflatten({name: p.astype(np.float64) for name, p in flatten(params).items()})


@pytest.fixture(scope="module")
def tutorial():
    pytest.importorskip("tokenizers", reason="text needs tokenizers")
    return load("tutorial_text_classification")


REVIEWS = {
    "neg": ("dull", "a bore", "wooden", "far too long", "awful"),
    "pos": ("a delight", "moving", "funny", "beautifully shot", "superb"),
}


def review(label, rng):
    return "It was " + ", ".join(rng.choice(REVIEWS[label], 3))


def test_tutorial_on_a_file(tutorial, tmp_path, capsys):
    rng = np.random.default_rng(0)
    lines = [f"{review(label, rng)}\t{label}" for label in REVIEWS for _ in range(100)]
    (tmp_path / "reviews.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tutorial.main([str(tmp_path / "reviews.txt"), "--epochs", "12"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "160 texts to learn from, 40 to validate on: ['neg', 'pos']"
    assert printed[1] == "Epoch 1/12"
    number = r"(\d\.\d{4})"
    line = (
        rf"5/5 - \d+s - loss: {number} - accuracy: {number} "
        rf"- val_loss: {number} - val_accuracy: {number}"
    )
    first, last = ([float(x) for x in re.fullmatch(line, printed[i]).groups()] for i in (2, -1))
    assert last[0] < first[0]
    assert last[3] > 0.9


def test_tutorial_on_aclimdb(tutorial, tmp_path, capsys):
    """As the archive is laid out: other files lie about, and "unsup" is no class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        for label in REVIEWS:
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                text = review(label, rng) + ".<br /><br />Really."
                (folder / f"{i}_{7 if label == 'pos' else 2}.txt").write_text(text, "utf-8")
        (tmp_path / part / "urls_pos.txt").write_text("http://www.imdb.com/title/tt0000001\n")
        (tmp_path / part / "labeledBow.feat").write_text("9 0:1\n")
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0_0.txt").write_text("It was.", "utf-8")
    (tmp_path / "imdb.vocab").write_text("the\n")
    tutorial.main([str(tmp_path), "--epochs", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "80 texts to learn from, 40 to validate on: ['neg', 'pos']"
    assert printed[1::2] == ["Epoch 1/2", "Epoch 2/2"]
    assert printed[2].startswith("3/3 - ")


def test_tutorial_has_text_of_its_own(tutorial):
    for texts, labels in tutorial.load(None):
        assert len(texts) == len(labels) > 20
        assert set(labels) == set(tutorial.PACKAGES)


def test_tutorial_is_the_one_described(tutorial):
    """Keras's layers and settings, for which the example's own names stand."""
    shapes = {
        name: p.shape for name, p in flatten(tutorial.Model(tutorial.VOCABULARY).params).items()
    }
    assert shapes["embedding.weight"] == (10_000, 64)
    assert shapes["attention.qkv.weight"] == (3 * 64, 64)
    assert shapes["hidden.weight"] == (64, 64)
    assert shapes["output.weight"] == (1, 64)
    with mock.patch.object(tutorial, "fit") as fit:
        tutorial.main([])
    assert fit.call_args.args[-2:] == (10, 32)  # epochs, texts a batch


def test_tutorial_wants_two_classes(tutorial, tmp_path, capsys):
    (tmp_path / "three.tsv").write_text("text\tlabel\na\tx\nb\ty\nc\tz\nd\tx\ne\ty\nf\tz\n")
    with pytest.raises(SystemExit):
        tutorial.main([str(tmp_path / "three.tsv")])
    assert "data: expected two classes, got 3" in capsys.readouterr().err


def test_tutorial_gradients(tutorial):
    model = tutorial.Model(7)
    model.params = widen(model.params)
    batch = tutorial.Batch(
        np.array([1, 5, 1, 6, 0]), np.array([0, 3, 5], np.int32), np.array([0, 1])
    )
    check_gradients(model.params, lambda: model.forward(batch), np.random.default_rng(0))


@pytest.fixture(scope="module")
def numbers():
    return load("translate_numbers")


def test_numbers_in_words(numbers):
    assert [" ".join(numbers.in_words(n)) for n in (0, 13, 40, 99, 100, 911, 2000, 340_021)] == [
        "zero",
        "thirteen",
        "forty",
        "ninety nine",
        "one hundred",
        "nine hundred eleven",
        "two thousand",
        "three hundred forty thousand twenty one",
    ]


def test_decoder_sees_all_digits_and_no_later_word(numbers):
    model = numbers.Translator()
    digits, words = numbers.examples(np.array([340_021, 7]))
    logits, _ = model.forward(digits, words)
    assert logits.shape == (len(words.ids), len(numbers.WORDS))
    n = words.cu_seqlens[1]  # the rows of the first number
    later = words.ids.copy()
    later[4:n] = 1
    changed, _ = model.forward(digits, numbers.Batch(later, words.cu_seqlens, words.labels))
    np.testing.assert_array_equal(changed[:4], logits[:4])
    assert np.abs(changed[4:n] - logits[4:n]).max(axis=1).min() > 1e-3
    digits.ids[5] = 9  # the last digit of the first number
    changed, _ = model.forward(digits, words)
    assert np.abs(changed[:n] - logits[:n]).max(axis=1).min() > 1e-3
    np.testing.assert_allclose(changed[n:], logits[n:], rtol=0, atol=1e-5)


def test_translator_gradients(numbers):
    model = numbers.Translator()
    model.params = widen(model.params)
    pair = numbers.examples(np.array([340, 7]))
    check_gradients(model.params, lambda: model.forward(*pair), np.random.default_rng(0))


def test_numbers_are_learnt(numbers, capsys):
    share = numbers.main(["--steps", "100", "--tests", "100"])
    assert share > 0.5  # a start: 300 steps give more than 99 %
    assert "other numbers are right, word for word." in capsys.readouterr().out

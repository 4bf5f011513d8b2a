"""The scikit-learn estimator: its conventions, composition, and that it learns."""

import pickle

import numpy as np
import pytest

from fusedattn.encoder import Encoder, EncoderConfig
from fusedattn.text import train_tokenizer

pytest.importorskip("sklearn", reason="the estimator is scikit-learn's")
pytest.importorskip("tokenizers", reason="text needs tokenizers")
from sklearn import model_selection
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from fusedattn.integrations.sklearn import TextClassifier

SUBJECTS = {
    "cooking": ("stir", "the soup", "bake", "an onion", "butter", "slowly"),
    "sailing": ("hoist", "the anchor", "steer", "a harbour", "windward", "at noon"),
    "chess": ("castle", "the queen", "checkmate", "a gambit", "pawns", "early"),
}


def task(count=30, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(list(SUBJECTS), count // len(SUBJECTS)))
    return [" ".join(rng.choice(SUBJECTS[label], 4)) for label in labels], labels


def small(**changes):
    shape = {"vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 1, "max_length": 24}
    training = {"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "random_state": 0}
    return TextClassifier(**{**shape, **training, "dropout": 0.1, **changes})


@pytest.fixture(scope="module")
def fitted():
    return small().fit(*task())


CHECKS = [  # those of scikit-learn 1.6's that do not feed numbers to the estimator
    "check_estimator_cloneable",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_mixin_order",
]


@pytest.mark.parametrize("check", CHECKS)
def test_checks_of_scikit_learn(check):
    getattr(estimator_checks, check)("TextClassifier", small())


def test_it_learns(fitted):
    texts, labels = task(60, seed=1)
    assert fitted.score(texts, labels) > 0.9
    assert fitted.classes_.tolist() == sorted(SUBJECTS)
    assert len(fitted.history_) == 6
    proba = fitted.predict_proba(texts)
    assert (proba.shape, proba.dtype) == ((60, 3), np.float32)
    np.testing.assert_allclose(proba.sum(axis=1), 1.0, atol=1e-6)
    predicted = fitted.predict(texts)
    assert predicted.dtype.kind == "U"
    np.testing.assert_array_equal(predicted, fitted.classes_[proba.argmax(axis=1)])
    assert fitted.predict([]).shape == (0,)


def test_same_seed_same_model(fitted):
    texts, labels = task()
    again = clone(fitted).fit(np.array(texts, object), labels.tolist())
    np.testing.assert_array_equal(again.predict_proba(texts), fitted.predict_proba(texts))
    other = clone(fitted).set_params(random_state=1).fit(texts, labels)
    assert np.abs(other.predict_proba(texts) - fitted.predict_proba(texts)).max() > 1e-3


def test_a_clone_is_not_fitted(fitted):
    with pytest.raises(NotFittedError):
        clone(fitted).predict(["stir the soup"])


def test_pickle(fitted):
    texts, _ = task()
    back = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(back.predict_proba(texts), fitted.predict_proba(texts))


def test_labels_of_any_kind(fitted):
    texts, labels = task()
    numbers = small(epochs=1).fit(texts, np.unique(labels, return_inverse=True)[1] * 10 - 5)
    assert set(numbers.predict(texts)) <= {-5, 5, 15}
    flags = small(epochs=1, class_weight="balanced").fit(texts, labels == "chess")
    assert flags.classes_.dtype == bool
    assert flags.predict(texts).dtype == bool


def test_class_weight_changes_what_is_learnt():
    texts, labels = task()
    one, other = (
        small(epochs=1, class_weight={"chess": w, "cooking": 1.0, "sailing": 1.0}).fit(
            texts, labels
        )
        for w in (0.01, 100.0)
    )
    chess = one.classes_.tolist().index("chess")
    assert (one.predict_proba(texts) < other.predict_proba(texts))[:, chess].all()


def test_pipeline_cross_validation_and_grid():
    texts, labels = task()
    lower = FunctionTransformer(lambda X: [text.lower() for text in X])
    model = make_pipeline(lower, small())
    scores = model_selection.cross_val_score(model, texts, labels, cv=2)
    assert scores.shape == (2,)
    assert scores.mean() > 0.5
    search = model_selection.GridSearchCV(small(), {"epochs": [0, 6]}, cv=2).fit(texts, labels)
    assert search.best_params_ == {"epochs": 6}
    assert search.predict(texts).shape == (30,)


def test_from_a_folder(tmp_path):
    pytest.importorskip("safetensors", reason="folders need safetensors")
    texts, labels = task()
    tokenizer = train_tokenizer(texts, 120, max_length=32)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32}
    config = EncoderConfig(tokenizer.get_vocab_size(), **shape, initializer_range=0.1)
    encoder = Encoder(config, tokenizer=tokenizer, seed=5)
    encoder.save_pretrained(tmp_path)
    start = small(pretrained=tmp_path, epochs=0).fit(texts, labels)
    word = start.model_.encoder.params["embeddings"]["word"]["weight"]
    np.testing.assert_array_equal(word, encoder.params["embeddings"]["word"]["weight"])
    assert small(pretrained=tmp_path, epochs=12).fit(texts, labels).score(texts, labels) > 0.9
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"^pretrained: expected a folder with a tokenizer"):
        small(pretrained=tmp_path).fit(texts, labels)


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        ("text", ["a"], TypeError, r"^X: expected a one-dimensional sequence of str, got one str"),
        ([1, 2], ["a", "b"], TypeError, r"^X: expected str, got int at 0"),
        (np.array([["a"], ["b"]]), [0, 1], TypeError, r"^X: .* got an array of shape \(2, 1\)"),
        ([], [], ValueError, r"^X: expected at least 1 text, got none"),
        (["a", "b"], [1, 1], ValueError, r"^y: expected labels of at least 2 classes, got 1"),
        (["a", "b"], [1, 2, 3], ValueError, "inconsistent numbers of samples"),
        (["a", "b"], [0.5, 0.7], ValueError, "Unknown label type: continuous"),
    ],
)
def test_bad_input(X, y, error, message):
    with pytest.raises(error, match=message):
        small().fit(X, y)

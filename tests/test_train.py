"""Losses, the optimizer, metrics and the training loop."""

import json
import math

import numpy as np
import pytest

from fusedattn.encoder import Encoder, EncoderConfig, TextClassifier
from fusedattn.losses import cross_entropy
from fusedattn.metrics import accuracy, macro_f1
from fusedattn.nn import flatten
from fusedattn.optim import SCHEDULES, AdamW, clip_scale, global_norm
from fusedattn.text import Dataset
from fusedattn.train import Trainer, TrainingConfig, evaluate

pytest.importorskip("tqdm", reason="training needs tqdm")

CONFIG = EncoderConfig(
    vocab_size=20,
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=12,
    initializer_range=0.1,
)


def first_token_data(count=60, seed=0):
    """Which of the tokens 1, 2, 3 comes first? Mean pooling of the tokens alone cannot tell."""
    rng = np.random.default_rng(seed)
    sequences = [
        np.concatenate([rng.permutation([1, 2, 3]), rng.integers(4, 20, rng.integers(0, 8))])
        for _ in range(count)
    ]
    return Dataset([s.astype(np.int32) for s in sequences], np.array([s[0] - 1 for s in sequences]))


def fit(seed=0, validation=None, model=None, **options):
    settings = {"epochs": 12, "learning_rate": 0.01, "max_sentences": 10, "seed": seed}
    places = {key: options.pop(key) for key in ("out_dir", "augment", "loss") if key in options}
    model = model or TextClassifier(Encoder(CONFIG, seed=seed), ["a", "b", "c"], seed=seed)
    trainer = Trainer(
        model, TrainingConfig(**{**settings, **options}), show_progress_bar=False, **places
    )
    return model, trainer.fit(first_token_data(), validation)


def test_training_learns_what_needs_attention():
    model, result = fit(epochs=40)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[0] > 1.0
    assert losses[-1] < 0.1
    assert np.mean(losses[20:]) < np.mean(losses[:20])
    assert evaluate(model, first_token_data())["accuracy"] == 1.0
    assert evaluate(model, first_token_data(seed=5))["accuracy"] > 0.8
    assert result.tokens_per_second > 0


def test_same_seed_same_bits():
    one, again, other = fit(seed=3, epochs=2), fit(seed=3, epochs=2), fit(seed=4, epochs=2)
    np.testing.assert_equal(one[0].params, again[0].params)
    losses = [[entry["train_loss"] for entry in r.history] for _, r in (one, again, other)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_best_epoch_is_kept(tmp_path):
    validation = first_token_data(seed=9)
    model, result = fit(validation=validation, learning_rate=0.05, out_dir=tmp_path)
    scores = [entry["accuracy"] for entry in result.history]
    assert result.best_epoch == 1 + scores.index(max(scores))
    assert evaluate(model, validation)["accuracy"] == max(scores)
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == result.history
    expected = {"epoch", "train_loss", "tokens_per_second", "loss", "accuracy", "macro_f1"}
    assert set(result.history[0]) == expected


def test_without_validation_the_last_epoch_is_kept():
    _, result = fit(epochs=3)
    assert result.best_epoch == 3
    assert not result.interrupted


def test_interrupt_keeps_the_best_so_far():
    validation = first_token_data(seed=9)
    seen = []

    def stop_in_the_fourth_epoch(batch, rng):
        seen.append(len(batch))
        if sum(seen) > 200:  # 60 sentences an epoch
            raise KeyboardInterrupt
        return batch

    model, result = fit(validation=validation, augment=stop_in_the_fourth_epoch)
    assert result.interrupted
    assert len(result.history) == 3
    best = max(entry["accuracy"] for entry in result.history)
    assert evaluate(model, validation)["accuracy"] == best


def test_loss_can_be_replaced():
    calls = []

    def loss(logits, labels):
        calls.append(len(labels))
        return cross_entropy(logits, labels)

    fit(epochs=1, loss=loss)
    assert sum(calls) == 60


def test_unknown_schedule():
    with pytest.raises(ValueError, match=r"^schedule: expected one of .*, got 'step'"):
        fit(schedule="step")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_against_its_formula(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((5, 4)), np.array([0, 3, 1, 1, 2])
    loss, vjp = cross_entropy(logits, labels, smoothing)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    assert math.isclose(loss, -(target * np.log(p)).sum() / 5, rel_tol=1e-12)
    np.testing.assert_allclose(vjp(2.0), 2 * (p - target) / 5, rtol=1e-12, atol=1e-15)


def test_cross_entropy_of_huge_logits_is_finite():
    loss, vjp = cross_entropy(np.array([[1e4, -1e4]], np.float32), np.array([1]))
    assert loss == 2e4
    np.testing.assert_array_equal(vjp(1.0), [[1, -1]])


@pytest.mark.parametrize(
    ("labels", "smoothing", "message"),
    [
        ([0], 0.0, r"^labels: expected shape \(2,\), got \(1,\)"),
        ([0, 3], 0.0, r"^labels: expected values in \[0, 3\), got 0 to 3"),
        ([0, 1], 1.0, r"^label_smoothing: expected a value in \[0, 1\), got 1.0"),
    ],
)
def test_cross_entropy_errors(labels, smoothing, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(np.zeros((2, 3)), np.array(labels), smoothing)


def test_metrics():
    labels, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 4])
    assert accuracy(labels, predicted) == 4 / 6
    # F1: class 0 2/3, class 1 2/3, class 2 4/5, class 4 0; class 3 is in neither.
    assert math.isclose(macro_f1(labels, predicted), (2 / 3 + 2 / 3 + 4 / 5) / 4)
    assert math.isnan(accuracy(labels[:0], predicted[:0]))
    assert math.isnan(macro_f1(labels[:0], predicted[:0]))


def test_macro_f1_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="the peer is scikit-learn")
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 9, 50), rng.integers(0, 9, 50)
    expected = metrics.f1_score(labels, predicted, average="macro")
    assert math.isclose(macro_f1(labels, predicted), expected, rel_tol=1e-12)


def test_adamw_against_its_formula():
    rng = np.random.default_rng(0)
    start = {"w": rng.standard_normal((300, 200)), "n": {"b": rng.standard_normal(3)}}
    params = {"w": start["w"].copy(), "n": {"b": start["n"]["b"].copy()}}
    optimizer = AdamW(params, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    expected = flatten(start)
    m = dict.fromkeys(expected, 0.0)
    v = dict.fromkeys(expected, 0.0)
    for t in range(1, 4):
        grads = {"w": rng.standard_normal((300, 200)), "n": {"b": rng.standard_normal(3)}}
        optimizer.step(grads, 0.01, scale=0.5)
        for name, g in flatten(grads).items():
            m[name] = 0.8 * m[name] + 0.2 * 0.5 * g
            v[name] = 0.9 * v[name] + 0.1 * (0.5 * g) ** 2
            step = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-6)
            decay = 0.1 if name == "w" else 0.0  # matrices alone decay
            expected[name] = expected[name] - 0.01 * (decay * expected[name] + step)
    assert optimizer.steps == 3
    for name, p in flatten(params).items():
        np.testing.assert_allclose(p, expected[name], rtol=1e-12, atol=1e-14)


def test_adamw_updates_in_place_and_wants_whole_arrays():
    w = np.ones((4, 3), np.float32)
    AdamW({"w": w}).step({"w": np.ones((4, 3), np.float32)}, 0.1)
    assert (w < 1).all()
    with pytest.raises(ValueError, match=r"^params: expected C-contiguous arrays, w is not"):
        AdamW({"w": w.T})


def test_clipping():
    grads = {"a": np.array([[3.0, 0.0]]), "b": {"c": np.array([4.0])}}
    assert global_norm(grads) == 5.0
    assert clip_scale(5.0, 1.0) == 0.2
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(5.0, None) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_and_fall(name):
    schedule = SCHEDULES[name]
    factors = [schedule(x, 0.2) for x in np.linspace(0, 1, 101)]
    assert factors[0] == 0
    assert math.isclose(factors[10], 0.5)
    assert math.isclose(max(factors), 1)
    assert math.isclose(factors[60], 0.5)
    assert math.isclose(factors[100], 0, abs_tol=1e-12)
    assert np.argmax(factors) == 20
    assert schedule(0.0, 0.0) == 1

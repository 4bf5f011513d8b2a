"""Losses, the optimizer, metrics and the training loop."""

import json
import math

import numpy as np
import pytest

from fusedattn.encoder import Encoder, EncoderConfig, TextClassifier
from fusedattn.losses import cross_entropy
from fusedattn.metrics import accuracy, macro_f1
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

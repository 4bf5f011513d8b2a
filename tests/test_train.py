"""Losses, the optimizer, metrics and the training loop."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fusedattn.encoder import Encoder, EncoderConfig, TextClassifier
from fusedattn.losses import cross_entropy
from fusedattn.metrics import accuracy, macro_f1
from fusedattn.nn import flatten, leaves, map_leaves
from fusedattn.text import Dataset
from fusedattn.train import (
    CHECKPOINT,
    Sums,
    Trainer,
    TrainingConfig,
    evaluate,
    layer_rates,
    plot_history,
    read_history,
)
from fusedattn.train.files import write_checkpoint
from fusedattn.train.state import hold_interrupts

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
    kept = ("out_dir", "augment", "loss", "show_progress_bar")
    places = {key: options.pop(key) for key in kept if key in options}
    model = model or TextClassifier(Encoder(CONFIG, seed=seed), ["a", "b", "c"], seed=seed)
    resume = options.pop("resume", False)
    trainer = Trainer(model, TrainingConfig(**{**settings, **options}), **places)
    return model, trainer.fit(first_token_data(), validation, resume=resume)


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
    expected = {"epoch", "step", "train_loss", "tokens_per_second", "loss", "accuracy", "macro_f1"}
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


class Killed(Exception):
    """Stands for a process that ends without a word."""


def killed_after(batches):
    """An `augment` that lets so many batches pass."""
    left = iter(range(batches))

    def augment(batch, rng):
        if next(left, None) is None:
            raise Killed
        return batch

    return augment


def untimed(history):
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in history]


@pytest.mark.parametrize("batches", [0, 3, 6, 7, 12, 13, 25])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2, "evaluate_every": 2}, {"freeze": ("encoder.embeddings",)}],
    ids=str,
)
def test_resumed_training_has_the_same_bits(tmp_path, batches, options):
    """6 batches an epoch; a checkpoint after each step."""
    options = {
        "epochs": 4,
        "validation": first_token_data(count=20, seed=9),
        "checkpoint_seconds": 0,
        "learning_rate": 0.03,
        **options,
    }
    whole, expected = fit(**options, out_dir=tmp_path / "whole")
    if batches < 24:
        with pytest.raises(Killed):
            fit(**options, out_dir=tmp_path / "halves", augment=killed_after(batches))
    else:
        fit(**options, out_dir=tmp_path / "halves")
    model, result = fit(**options, out_dir=tmp_path / "halves", resume=True)
    np.testing.assert_equal(model.params, whole.params)
    assert untimed(result.history) == untimed(expected.history)
    assert result.best_epoch == expected.best_epoch
    assert untimed(read_history(tmp_path / "halves")) == untimed(expected.history)


SCRIPT = """
import sys
from tests.test_train import fit, first_token_data
def augment(batch, rng):
    print("batch", flush=True)
    return batch
fit(epochs=5, validation=first_token_data(count=20, seed=9), checkpoint_seconds=0,
    augment=augment, out_dir=sys.argv[1], resume=True)
print("done", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_killed_training_resumes_with_the_same_bits(tmp_path):
    """30 batches, killed after a few and a random while, again and again."""
    root = Path(__file__).resolve().parents[1]
    rng, kills = np.random.default_rng(0), 0
    for _ in range(12):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(12):
                line = process.stdout.readline()
                assert line in {"batch\n", "done\n"}
                if line == "done\n":
                    break
            else:
                time.sleep(rng.uniform(0, 0.01))
                process.kill()
                kills += 1
        if line == "done\n":
            break
    assert line == "done\n"
    assert kills >= 2
    options = {"epochs": 5, "validation": first_token_data(count=20, seed=9)}
    whole, expected = fit(**options, out_dir=tmp_path / "whole")
    model, result = fit(**options, out_dir=tmp_path / "killed", resume=True)  # finished: only reads
    np.testing.assert_equal(model.params, whole.params)
    assert untimed(result.history) == untimed(expected.history)
    assert untimed(read_history(tmp_path / "killed")) == untimed(expected.history)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    fit(epochs=1, out_dir=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(tmp_path, {"x": np.zeros(3)}, {})
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_resume_refuses_another_training(tmp_path):
    fit(epochs=1, out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^out_dir: expected .* of another: epochs 1, here 2"):
        fit(epochs=2, out_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"^out_dir: expected .* of another: validation_data None"):
        fit(epochs=1, validation=first_token_data(seed=9), out_dir=tmp_path, resume=True)
    _, result = fit(epochs=2, out_dir=tmp_path)  # without resume it begins anew
    assert len(result.history) == 2


def test_data_without_labels_is_known_again_by_another_process():
    """As after a kill in pre-training: nothing of the checksum is of this process alone."""
    script = (
        "import numpy as np; from fusedattn.text import Dataset; "
        "from fusedattn.train import TrainingConfig; from fusedattn.train.state import identify; "
        "print(identify(TrainingConfig(), {}, Dataset([np.arange(9)]))['data'])"
    )
    runs = [subprocess.run([sys.executable, "-c", script], stdout=-1, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout


def test_ctrl_c_saves(tmp_path):
    """The signal comes as the kernel runs; no update is left half done."""

    def press(batch, rng):
        pressed.append(len(batch))
        if len(pressed) == 9:
            signal.raise_signal(signal.SIGINT)
        return batch

    pressed = []
    _, result = fit(epochs=3, augment=press, out_dir=tmp_path)
    assert result.interrupted
    assert (tmp_path / CHECKPOINT).exists()
    model, result = fit(epochs=3, out_dir=tmp_path, resume=True)
    assert not result.interrupted
    np.testing.assert_equal(model.params, fit(epochs=3)[0].params)


def test_an_interrupt_waits_for_the_update():
    done = []

    @hold_interrupts()
    def update():
        signal.raise_signal(signal.SIGINT)
        done.append("update")

    with pytest.raises(KeyboardInterrupt):
        update()
    assert done == ["update"]


def test_accumulated_batches_are_one_large_batch():
    """Without dropout; up to the order of sums."""
    encoder = replace(CONFIG, hidden_dropout_prob=0.0)
    models = []
    for settings in ({"max_sentences": 20}, {"max_sentences": 5, "accumulate": 4}):
        model = TextClassifier(Encoder(encoder, seed=1), ["a", "b", "c"], seed=1)
        fit(model=model, epochs=1, max_grad_norm=0.5, **settings)
        models.append(flatten(model.params))
    for name, p in models[0].items():
        np.testing.assert_allclose(p, models[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


def take_steps(batches, accumulate, reduce=None):
    """The parameters after an epoch of exactly these batches, without dropout, and the losses."""
    model = TextClassifier(Encoder(replace(CONFIG, hidden_dropout_prob=0.0)), ["a", "b", "c"])
    given = iter(batches)
    trainer = Trainer(
        model,
        TrainingConfig(
            epochs=1, max_sentences=1, accumulate=accumulate, max_grad_norm=0.1, freeze=FROZEN
        ),
        augment=lambda batch, rng: next(given),
        reduce=reduce,
    )
    result = trainer.fit(Dataset([np.array([1], np.int32)] * len(batches)))
    return flatten(model.params), result.history[-1]["train_loss"]


FROZEN = ("encoder.embeddings", "encoder.blocks.0.attention.")


def test_two_that_reduce_take_the_steps_of_one_that_accumulates():
    """Threads stand for processes: the same bits, though the shares have unlike labels."""
    batches = list(first_token_data(count=55).batches(4096, 10))
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 10, 5]
    shares, barrier = [None, None], threading.Barrier(2)

    def train(rank):
        def reduce(sums):
            assert not any(name.startswith(FROZEN) for name in flatten(sums.gradients))
            shares[rank] = sums
            calls.append(rank)
            barrier.wait(60)
            first, second = shares
            others = flatten(second.gradients)
            gradients = map_leaves(lambda name, g: g + others[name], first.gradients)
            barrier.wait(60)
            return Sums(first.loss + second.loss, first.labels + second.labels, gradients)

        return take_steps(batches[rank::2], 1, reduce)

    calls = []
    expected, loss = take_steps(batches, 2)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(train, range(2)))
    assert sorted(calls) == [0, 0, 0, 1, 1, 1]
    for params, mean in results:
        np.testing.assert_equal(params, expected)
        assert mean == loss
    alone, _ = take_steps(batches[::2], 1)
    assert not np.array_equal(alone["classifier.weight"], expected["classifier.weight"])


def test_evaluation_every_few_steps_and_early_stopping():
    validation = first_token_data(count=30, seed=9)
    _, result = fit(epochs=2, validation=validation, evaluate_every=4)
    assert [entry["step"] for entry in result.history] == [4, 8, 12]
    assert [entry["epoch"] for entry in result.history] == [0.667, 1.333, 2]
    _, result = fit(epochs=60, validation=validation, learning_rate=0.05, patience=3)
    scores = [entry["accuracy"] for entry in result.history]
    assert len(scores) < 60
    assert max(scores) == scores[-4]
    assert result.best_epoch == len(scores) - 3


def test_patience_needs_something_to_judge_by():
    with pytest.raises(ValueError, match=r"^patience: expected validation data"):
        fit(epochs=1, patience=1)


def test_monitored_loss_is_to_be_small():
    validation = first_token_data(count=30, seed=9)
    _, result = fit(validation=validation, learning_rate=0.05, monitor="loss")
    losses = [entry["loss"] for entry in result.history]
    assert result.best_epoch == 1 + losses.index(min(losses))
    with pytest.raises(ValueError, match=r"^monitor: expected one of .*'accuracy'.*, got 'f1'"):
        fit(epochs=1, validation=validation, monitor="f1")


def test_frozen_and_slow_layers():
    names = [name for name, _ in leaves(TextClassifier(Encoder(CONFIG), ["a", "b"]).params)]
    rates = layer_rates(names, ["encoder.embeddings"], 0.5)
    by_layer = {
        "classifier.weight": 1.0,
        "encoder.blocks.1.attention.qkv.weight": 0.5,
        "encoder.blocks.0.attention.qkv.weight": 0.25,
        "encoder.embeddings.word.weight": 0.0,
    }
    assert {name: rates[name] for name in by_layer} == by_layer
    assert layer_rates(names, (), 0.5)["encoder.embeddings.word.weight"] == 0.125
    with pytest.raises(ValueError, match=r"^freeze: .*, got 'decoder'"):
        layer_rates(names, ["decoder"])

    start = TextClassifier(Encoder(CONFIG, seed=0), ["a", "b", "c"], seed=0)
    model, _ = fit(epochs=1, freeze=("encoder.",))
    for name, p in leaves(model.params):
        same = np.array_equal(p, flatten(start.params)[name])
        assert same == name.startswith("encoder."), name


def test_balanced_class_weights():
    """A label of a class nine times as rare counts nine times as much."""
    seen = []

    def spy(logits, labels, smoothing, weights):
        seen.append(weights)
        return cross_entropy(logits, labels, smoothing, weights)

    data = Dataset([np.array([1], np.int32)] * 10, np.array([0] * 9 + [1]))
    model = TextClassifier(Encoder(CONFIG), ["a", "b"])
    with mock.patch("fusedattn.train.trainer.cross_entropy", spy):
        Trainer(model, TrainingConfig(epochs=1, class_weights="balanced")).fit(data)
    np.testing.assert_allclose(seen[0], [10 / 18, 5])


def test_a_loss_that_is_not_a_number_ends_the_training():
    with pytest.raises(FloatingPointError, match=r"^loss: expected a finite number, got nan at"):
        fit(epochs=1, loss=lambda logits, labels: (math.nan, lambda d: d * logits))


def test_no_data():
    trainer = Trainer(TextClassifier(Encoder(CONFIG), ["a", "b"]), TrainingConfig())
    with pytest.raises(ValueError, match=r"^train: expected at least one sequence, got none"):
        trainer.fit(Dataset([], np.empty(0, int)))


def test_progress_bar_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    validation = first_token_data(count=30, seed=9)
    _, result = fit(epochs=2, validation=validation, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "120/120" in shown
    assert "tokens/s" in shown
    assert "loss" in shown
    fit(epochs=1)
    assert capsys.readouterr().err == ""
    plot_history(result.history, tmp_path / "curves.png")
    plot_history(result.history, tmp_path / "curves.svg")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "step"}, r"^schedule: expected one of .*, got 'step'"),
        ({"accumulate": 0}, r"^accumulate: expected at least 1, got 0"),
        ({"patience": 0}, r"^patience: expected at least 1, got 0"),
        ({"epochs": -1}, r"^epochs: expected at least 0, got -1"),
        ({"max_sentences": 0}, r"^max_sentences: expected at least 1, got 0"),
        ({"learning_rate": -1.0}, r"^learning_rate: expected at least 0, got -1.0"),
        ({"weight_decay": math.nan}, r"^weight_decay: expected at least 0, got nan"),
        ({"seed": -1}, r"^seed: expected at least 0, got -1"),
        ({"max_grad_norm": 0.0}, r"^max_grad_norm: expected more than 0, got 0.0"),
        ({"label_smoothing": 1.0}, r"^label_smoothing: expected a value in \[0, 1\), got 1.0"),
        ({"warmup": 1.0}, r"^warmup: expected a share in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"^layer_decay: expected a factor in \(0, 1\], got 0.0"),
        ({"class_weights": "equal"}, r"^class_weights: expected 'balanced' or .*, got 'equal'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


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

"""The training loop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusedattn.losses import cross_entropy
from fusedattn.metrics import accuracy, macro_f1
from fusedattn.nn import VJP, Array, Params, Rng, leaves
from fusedattn.optim import SCHEDULES, AdamW, clip_scale, global_norm
from fusedattn.text import Batch, Dataset


class Model(Protocol):
    """What can be trained: parameters, and logits with their vjp."""

    params: Params

    def forward(self, batch: Batch, rng: Rng | None = None) -> tuple[Array, VJP]:
        """Logits (N, classes) and their vjp; random only where an `rng` is given."""
        ...


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes
    ----------
    epochs : int, default 10
    max_tokens, max_sentences : int, default 4096 and 32
        What a batch may hold.
    learning_rate : float, default 1e-3
        At its peak.
    schedule : str, default "linear"
        A key of `fusedattn.optim.SCHEDULES`: how the rate falls to 0 after warming up.
    warmup : float, default 0.1
        The share of the training in which the rate rises.
    weight_decay : float, default 0.01
    betas : tuple of float, default (0.9, 0.98)
    max_grad_norm : float or None, default 1.0
        Gradients are scaled down to this norm; None leaves them.
    label_smoothing : float, default 0
    monitor : str, default "accuracy"
        The metric of `evaluate` by which the best epoch is chosen; the larger the better.
    seed : int, default 0
        Of the order of the batches, of dropout and of `augment`.
    """

    epochs: int = 10
    max_tokens: int = 4096
    max_sentences: int = 32
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    monitor: str = "accuracy"
    seed: int = 0


@dataclass
class TrainingResult:
    """What `Trainer.fit` did.

    Attributes
    ----------
    history : list of dict
        One entry an epoch, the lines of history.jsonl.
    best_epoch : int
        The epoch, from 1, whose parameters the model now has; 0 for those it came with.
    tokens_per_second : float
        In training, evaluation left out.
    interrupted : bool
        Whether Ctrl-C ended it.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    tokens_per_second: float = 0.0
    interrupted: bool = False


def evaluate(
    model: Model, data: Dataset, max_tokens: int = 4096, max_sentences: int = 256
) -> dict[str, float]:
    """Loss (nats), accuracy and macro-F1 of a model on labelled sequences, without dropout."""
    loss, predicted = 0.0, []
    for batch in data.batches(max_tokens, max_sentences):
        logits, _ = model.forward(batch)
        loss += cross_entropy(logits, batch.labels)[0] * len(batch)
        predicted.append(logits.argmax(axis=1))
    guesses = np.concatenate(predicted) if predicted else np.empty(0, int)
    return {
        "loss": loss / max(1, len(data)),
        "accuracy": accuracy(data.labels, guesses),
        "macro_f1": macro_f1(data.labels, guesses),
    }


class Trainer:
    """Fits a model: AdamW with warm-up, clipping, evaluation each epoch, the best epoch kept.

    Parameters
    ----------
    model : Model
        Its parameters are updated in place.
    config : TrainingConfig
    loss : callable, default `fusedattn.losses.cross_entropy` with the config's label smoothing
        (logits, labels) -> (loss, vjp).
    augment : callable, optional
        (batch, rng) -> batch, applied to every training batch.
    out_dir : path, optional
        Where history.jsonl goes.
    show_progress_bar : bool, optional
        By default, where standard error is a terminal.
    """

    def __init__(
        self,
        model: Model,
        config: TrainingConfig,
        *,
        loss: Callable[[Array, Array], tuple[float, Callable[[float], Array]]] | None = None,
        augment: Callable[[Batch, Rng], Batch] | None = None,
        out_dir: str | Path | None = None,
        show_progress_bar: bool | None = None,
    ) -> None:
        if config.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {sorted(SCHEDULES)}, got {config.schedule!r}"
            )
        self.model, self.config = model, config
        self.loss = loss or (lambda z, y: cross_entropy(z, y, config.label_smoothing))
        self.augment = augment
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.show_progress_bar = show_progress_bar

    def fit(self, train: Dataset, validation: Dataset | None = None) -> TrainingResult:
        """Train for the config's epochs; with `validation`, end with the best epoch's parameters.

        Ctrl-C ends the training early, with the best parameters so far (those of the last step,
        where no epoch has been evaluated).
        """
        config, result = self.config, TrainingResult()
        order_rng, noise_rng = (
            np.random.default_rng(s) for s in np.random.SeedSequence(config.seed).spawn(2)
        )
        optimizer = AdamW(self.model.params, betas=config.betas, weight_decay=config.weight_decay)
        total = config.epochs * len(train)
        best: dict[str, Array] | None = None
        best_score, seconds, tokens, seen = -np.inf, 0.0, 0, 0
        bar = self._progress_bar(total)
        try:
            for epoch in range(1, config.epochs + 1):
                losses = []
                for batch in train.batches(config.max_tokens, config.max_sentences, order_rng):
                    started = time.perf_counter()
                    progress = (seen + 0.5 * len(batch)) / total
                    losses.append(self._step(batch, optimizer, progress, noise_rng))
                    seconds += time.perf_counter() - started
                    tokens += len(batch.ids)
                    seen += len(batch)
                    bar.set_postfix_str(
                        f"loss {losses[-1]:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False
                    )
                    bar.update(len(batch))
                entry = {"epoch": epoch, "train_loss": float(np.mean(losses))}
                entry["tokens_per_second"] = round(tokens / seconds)
                if validation is not None:
                    entry |= evaluate(self.model, validation, config.max_tokens)
                    if entry[config.monitor] > best_score:
                        best_score, result.best_epoch = entry[config.monitor], epoch
                        best = {name: p.copy() for name, p in leaves(self.model.params)}
                else:
                    result.best_epoch = epoch
                self._record(result, entry)
        except KeyboardInterrupt:
            result.interrupted = True
        finally:
            bar.close()
        if best is not None:
            for name, p in leaves(self.model.params):
                p[...] = best[name]
        result.tokens_per_second = tokens / seconds if seconds else 0.0
        return result

    def _step(self, batch: Batch, optimizer: AdamW, progress: float, rng: Rng) -> float:
        """One forward, backward and update, `progress` of the way through; the loss."""
        config = self.config
        if self.augment is not None:
            batch = self.augment(batch, rng)
        logits, vjp = self.model.forward(batch, rng)
        loss, loss_vjp = self.loss(logits, batch.labels)
        grads, _ = vjp(loss_vjp(1.0))
        factor = SCHEDULES[config.schedule](progress, config.warmup)
        scale = clip_scale(global_norm(grads), config.max_grad_norm)
        optimizer.step(grads, config.learning_rate * factor, scale)
        return loss

    def _record(self, result: TrainingResult, entry: dict[str, float]) -> None:
        result.history.append(entry)
        if self.out_dir is not None:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            mode = "w" if len(result.history) == 1 else "a"
            with open(self.out_dir / "history.jsonl", mode, encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _progress_bar(self, sentences: int) -> Any:
        from tqdm import tqdm

        hidden = None if self.show_progress_bar is None else not self.show_progress_bar
        return tqdm(total=sentences, disable=hidden, desc="training", unit="text")

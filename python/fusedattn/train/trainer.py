"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.losses import cross_entropy
from fusedattn.nn import Array, Rng, freezing, leaves, unflatten
from fusedattn.optim import SCHEDULES, AdamW, clip_scale, global_norm
from fusedattn.text import IGNORE, Batch, Dataset
from fusedattn.train.config import TrainingConfig
from fusedattn.train.evaluation import evaluate as evaluate_classifier
from fusedattn.train.files import remove_checkpoint, write_history
from fusedattn.train.model import Loss, Model, Reduce, Sums
from fusedattn.train.rates import layer_rates
from fusedattn.train.state import Run, State, hold_interrupts, identify

_ORDER, _NOISE = 0, 1  # two streams of random numbers from one seed


@dataclass
class TrainingResult:
    """What `Trainer.fit` did.

    Attributes
    ----------
    history : list of dict
        One entry an evaluation, the lines of history.jsonl.
    best_epoch : float
        When, in epochs from the start, the model had the parameters that it has now; 0 for those
        it came with.
    tokens_per_second : float
        In training, evaluation left out.
    seconds : float
        Spent on that, before a break too.
    interrupted : bool
        Whether Ctrl-C ended it.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: float = 0
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    interrupted: bool = False


class Trainer:
    """Fits a model: AdamW with warm-up, clipping, evaluation now and then, the best one kept.

    Parameters
    ----------
    model : Model
        Its parameters are updated in place.
    config : TrainingConfig
    loss : callable, default `fusedattn.losses.cross_entropy` as the config has it
        (logits, labels that are not `fusedattn.text.IGNORE`) -> (loss, vjp), a mean over labels.
    augment : callable, optional
        (batch, rng) -> batch, applied to every training batch: `fusedattn.text.Masking` for
        pre-training, say.
    evaluate : callable, default `fusedattn.train.evaluate`
        (model, data) -> metrics by name, `config.monitor` among them.
    reduce : callable, optional
        (`Sums`) -> `Sums`, called once a step with what its batches add up to, before the gradients
        are clipped and the parameters updated: where several processes train together, it gives
        each of them the sums of all. Left out, the step is made of this process's batches alone.
    out_dir : path, optional
        Where history.jsonl and the checkpoint go. The checkpoint is written every
        `config.checkpoint_seconds`, after Ctrl-C and at the end.
    settings : dict, optional
        What else makes the training what it is (the model's dropout, what `augment` does), as JSON
        has it: a checkpoint of other settings is refused.
    show_progress_bar : bool, optional
        By default, where standard error is a terminal.
    """

    def __init__(
        self,
        model: Model,
        config: TrainingConfig,
        *,
        loss: Loss | None = None,
        augment: Callable[[Batch, Rng], Batch] | None = None,
        evaluate: Callable[[Any, Dataset], dict[str, float]] | None = None,
        reduce: Reduce | None = None,
        out_dir: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        show_progress_bar: bool | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.loss, self.augment, self.reduce = loss, augment, reduce
        self.evaluate = evaluate or (
            lambda m, data: evaluate_classifier(m, data, config.max_tokens)
        )
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.settings = dict(settings or {})
        self.show_progress_bar = show_progress_bar

    def fit(
        self, train: Dataset, validation: Dataset | None = None, *, resume: bool = False
    ) -> TrainingResult:
        """Train for the config's epochs; with `validation`, end with the best parameters.

        Ctrl-C ends the training early, with the best parameters so far (those of the last step,
        where nothing has been evaluated).

        Parameters
        ----------
        train, validation : Dataset
        resume : bool, default False
            Go on from the checkpoint in `out_dir`, if there is one; the model must be as it was
            when that training began. The result has the same bits as without the break, as far as
            NumPy's matrix products have them.

        Raises
        ------
        ValueError
            For a checkpoint of another model, config, data or settings, for no data, and
            for a config with `patience` without `validation`.
        FloatingPointError
            Where the loss is no longer a finite number.
        """
        config = self.config
        if not len(train):
            raise ValueError("train: expected at least one sequence, got none")
        if config.patience is not None and validation is None:
            raise ValueError("patience: expected validation data to judge by, got none")
        self._rates = layer_rates(
            (name for name, _ in leaves(self.model.params)), config.freeze, config.layer_decay
        )
        self._loss = self.loss or _default_loss(config, train)
        optimizer = AdamW(
            self.model.params,
            betas=config.betas,
            weight_decay=config.weight_decay,
            rates=self._rates.__getitem__,
        )
        identity = identify(config, self.model.params, train, validation) | self.settings
        run = Run(self.model.params, optimizer, identity, self.out_dir)
        if not (resume and run.load()) and self.out_dir is not None:
            remove_checkpoint(self.out_dir)
        self._write_history(run)
        bar = self._progress_bar(config.epochs * len(train), run.state.seen)
        interrupted = False
        frozen = {name for name, rate in self._rates.items() if not rate}
        try:
            with freezing(self.model.params, frozen):
                self._train(run, train, validation, bar)
        except KeyboardInterrupt:
            interrupted = True
            run.save()
        finally:
            bar.close()
        run.restore_best()
        state = run.state
        return TrainingResult(
            state.history,
            state.best_epoch,
            state.tokens / state.seconds if state.seconds else 0.0,
            state.seconds,
            interrupted,
        )

    def _train(self, run: Run, train: Dataset, validation: Dataset | None, bar: Any) -> None:
        """Step, evaluate and save until the end. Where it breaks off, `run` is between steps."""
        config, state = self.config, run.state
        if state.finished:
            return
        saved = time.monotonic()
        batches = self._batches(run, train)
        while state.epoch < config.epochs and not self._is_enough(run):
            if config.evaluate_every and state.step % config.evaluate_every == 0:
                self._record(run, train, validation)
                if self._is_enough(run):
                    break
            group = list(islice(batches, config.accumulate))
            if group:
                self._step(run, group, config.epochs * len(train), bar)
            else:
                if not config.evaluate_every or state.epoch + 1 == config.epochs:
                    self._record(run, train, validation)
                with hold_interrupts():
                    state.epoch, state.batch = state.epoch + 1, 0
                batches = self._batches(run, train)
            if time.monotonic() - saved >= config.checkpoint_seconds:
                run.save()
                saved = time.monotonic()
        state.finished = True
        run.save()

    def _batches(self, run: Run, train: Dataset) -> Iterator[Batch]:
        """The rest of the current epoch's batches."""
        config, state = self.config, run.state
        rng = np.random.default_rng((config.seed, _ORDER, state.epoch))
        return islice(
            train.batches(config.max_tokens, config.max_sentences, rng), state.batch, None
        )

    def _step(self, run: Run, group: list[Batch], total: int, bar: Any) -> None:
        """One update from a group of batches."""
        config, state = self.config, run.state
        started = time.perf_counter()
        sentences, tokens = sum(map(len, group)), sum(len(batch.ids) for batch in group)
        sums = self._add_up(group, state)
        if self.reduce is not None:
            sums = self.reduce(sums)
        labels = max(1, sums.labels)  # 0 where there was nothing to predict: no gradient either
        loss = sums.loss / labels
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss} at step {state.step + 1}; "
                f"a lower learning rate than {config.learning_rate} may help"
            )
        scale = clip_scale(global_norm(sums.gradients) / labels, config.max_grad_norm)
        progress = (state.seen + 0.5 * sentences) / total
        rate = config.learning_rate * SCHEDULES[config.schedule](progress, config.warmup)
        with hold_interrupts():
            run.optimizer.step(sums.gradients, rate, scale / labels)
            state.step += 1
            state.batch += len(group)
            state.seen += sentences
            state.tokens += tokens
            state.seconds += time.perf_counter() - started
            state.loss_sum += loss
            state.loss_steps += 1
        if not bar.disable:
            speed = state.tokens / state.seconds
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update(sentences)

    def _add_up(self, group: list[Batch], state: State) -> Sums:
        """The sums of a group of batches, in their order."""
        total, count = 0.0, 0
        sums: dict[str, Array] = {}
        for place, batch in enumerate(group, state.batch):
            rng = np.random.default_rng((self.config.seed, _NOISE, state.epoch, place))
            if self.augment is not None:
                batch = self.augment(batch, rng)
            labels = batch.labels[batch.labels != IGNORE]
            logits, vjp = self.model.forward(batch, rng)
            if len(labels):
                loss, loss_vjp = self._loss(logits, labels)
                dlogits = loss_vjp(float(len(labels)))
                total += loss * len(labels)
                count += len(labels)
            else:
                dlogits = np.zeros_like(logits)
            grads = leaves(vjp(dlogits)[0])
            learning = {name: g for name, g in grads if self._rates[name]}
            sums = {n: sums[n] + g for n, g in learning.items()} if sums else learning
        return Sums(total, count, unflatten(sums))

    def _record(self, run: Run, train: Dataset, validation: Dataset | None) -> None:
        """Evaluate, unless this step has been, and write a line of history."""
        state, monitor = run.state, self.config.monitor
        if state.evaluated == state.step:
            return
        epoch = round(state.seen / len(train), 3)
        entry: dict[str, float] = {
            "epoch": int(epoch) if epoch.is_integer() else epoch,
            "step": state.step,
            "train_loss": state.loss_sum / max(1, state.loss_steps),
            "tokens_per_second": round(state.tokens / state.seconds) if state.seconds else 0,
        }
        if validation is not None:
            metrics = self.evaluate(self.model, validation)
            if monitor not in metrics:
                raise ValueError(f"monitor: expected one of {sorted(metrics)}, got {monitor!r}")
            entry |= metrics
        with hold_interrupts():
            state.history.append(entry)
            state.evaluated, state.loss_sum, state.loss_steps = state.step, 0.0, 0
            if validation is None:
                state.best_epoch = entry["epoch"]
            elif self.config.is_better(entry[monitor], state.best_score):
                state.best_score, state.best_epoch = entry[monitor], entry["epoch"]
                state.worse = 0
                run.keep_best()
            else:
                state.worse += 1
        self._write_history(run)

    def _is_enough(self, run: Run) -> bool:
        return self.config.patience is not None and run.state.worse >= self.config.patience

    def _write_history(self, run: Run) -> None:
        if self.out_dir is not None:
            write_history(self.out_dir, run.state.history)

    def _progress_bar(self, sentences: int, done: int) -> Any:
        from tqdm import tqdm

        hidden = None if self.show_progress_bar is None else not self.show_progress_bar
        return tqdm(total=sentences, initial=done, disable=hidden, desc="training", unit="text")


def _default_loss(config: TrainingConfig, train: Dataset) -> Loss:
    """Cross-entropy with the config's smoothing and class weights."""

    def loss(logits: Array, labels: Array) -> tuple[float, Callable[[float], Array]]:
        weights = config.class_weights
        if weights == "balanced" and train.labels is not None:
            counts = np.bincount(train.labels, minlength=logits.shape[1])
            weights = tuple(len(train) / np.maximum(counts, 1) / logits.shape[1])
        if isinstance(weights, str):
            raise ValueError("class_weights: expected numbers where there are no labels to count")
        return cross_entropy(logits, labels, config.label_smoothing, weights)

    return loss

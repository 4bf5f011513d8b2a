"""How to train, as one frozen record."""

from __future__ import annotations

from dataclasses import dataclass

from fusedattn.optim import SCHEDULES

LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Attributes
    ----------
    epochs : int, default 10
    max_tokens, max_sentences : int, default 4096 and 32
        What a batch may hold.
    accumulate : int, default 1
        How many batches make a step: their gradients are summed, each label counting alike.
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
    class_weights : "balanced", tuple of float or None, default None
        What a label of each class counts in the loss; "balanced" is inverse to its frequency.
    freeze : tuple of str, default ()
        Parameters whose dotted name begins with one of these stay as they are, for example
        ``("encoder.embeddings", "encoder.blocks.0.")``. Layers that are wholly frozen cost no
        gradient, and backward ends above an encoder's lowest blocks where all of them are.
    layer_decay : float, default 1
        Each block learns at this multiple of the rate of the block above it (arXiv:1801.06146).
    evaluate_every : int or None, default None
        Steps from one evaluation to the next; None evaluates at the end of each epoch.
    monitor : str, default "accuracy"
        The metric by which the best evaluation is chosen: the smallest of "loss" and "perplexity",
        the largest of any other.
    patience : int or None, default None
        Stop after this many evaluations in a row without a better one.
    checkpoint_seconds : float, default 60
        Between checkpoints; 0 writes one after every step.
    seed : int, default 0
        Of the order of the batches, of dropout and of `augment`.
    """

    epochs: int = 10
    max_tokens: int = 4096
    max_sentences: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    class_weights: str | tuple[float, ...] | None = None
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0
    evaluate_every: int | None = None
    monitor: str = "accuracy"
    patience: int | None = None
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: expected one of {sorted(SCHEDULES)}, got {self.schedule!r}"
            )
        for name in ("max_tokens", "max_sentences", "accumulate", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("epochs", "learning_rate", "weight_decay", "seed"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm: expected more than 0, got {self.max_grad_norm}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing: expected a value in [0, 1), got {self.label_smoothing}"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup: expected a share in [0, 1), got {self.warmup}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay: expected a factor in (0, 1], got {self.layer_decay}")
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise ValueError(
                f"class_weights: expected 'balanced' or numbers, got {self.class_weights!r}"
            )

    def is_better(self, score: float, best: float | None) -> bool:
        """Whether a value of the monitored metric beats the best one so far; NaN never does."""
        if best is None:
            return score == score
        return score < best if self.monitor in LOWER_IS_BETTER else score > best

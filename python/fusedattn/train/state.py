"""Where a training stands: all that a checkpoint holds, and how it gets there and back."""

from __future__ import annotations

import contextlib
import signal
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusedattn.nn import Array, Params, leaves
from fusedattn.optim import AdamW
from fusedattn.text import Dataset
from fusedattn.train.config import TrainingConfig
from fusedattn.train.files import read_checkpoint, write_checkpoint


@dataclass
class State:
    """How far a training has come.

    No random generator is among it: each order and each batch has one of its own, seeded by the
    config's seed and the place in the training.

    Attributes
    ----------
    epoch, batch : int
        Epochs that are over, and batches of the current one.
    step : int
        Updates so far.
    seen, tokens : int
        Sequences and tokens trained on.
    seconds : float
        Spent on that, evaluation left out.
    evaluated : int
        The step of the last evaluation.
    loss_sum, loss_steps : float, int
        The steps' losses since the last evaluation.
    best_score, best_epoch, worse : float or None, float, int
        The best evaluation's, and how many came after it.
    history : list of dict
    finished : bool
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seen: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    best_score: float | None = None
    best_epoch: float = 0
    worse: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False


class Run:
    """A state with the arrays that belong to it: parameters, moments, the best parameters.

    Parameters
    ----------
    params : dict
    optimizer : AdamW
    identity : dict
        What a checkpoint must agree with, as from `identify`.
    folder : Path or None
        Where checkpoints go; None writes none.
    """

    def __init__(
        self, params: Params, optimizer: AdamW, identity: dict[str, Any], folder: Path | None
    ) -> None:
        self.state = State()
        self.params = dict(leaves(params))
        self.optimizer, self.identity, self.folder = optimizer, identity, folder
        self.best: dict[str, Array] | None = None

    def save(self) -> None:
        """Write the checkpoint."""
        if self.folder is None:
            return
        groups = {"params": self.params, "m": self.optimizer.m, "v": self.optimizer.v}
        if self.best is not None:
            groups["best"] = self.best
        arrays = {f"{group}.{n}": a for group, named in groups.items() for n, a in named.items()}
        write_checkpoint(
            self.folder, arrays, {"identity": self.identity, "state": asdict(self.state)}
        )

    def load(self) -> bool:
        """Go on from the checkpoint; False where there is none.

        Raises
        ------
        ValueError
            Where the checkpoint is that of another model, config or data.
        """
        found = None if self.folder is None else read_checkpoint(self.folder)
        if found is None:
            return False
        arrays, content = found
        theirs, ours = content["identity"], self.identity
        unlike = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if unlike:
            what = "; ".join(f"{k} {theirs.get(k)}, here {ours.get(k)}" for k in unlike)
            raise ValueError(
                f"out_dir: expected a checkpoint of this training in {self.folder}, "
                f"found one of another: {what}"
            )
        self.state = State(**content["state"])
        self.optimizer.steps = self.state.step
        for name, p in self.params.items():
            p[...] = arrays[f"params.{name}"]
        for group, moments in (("m", self.optimizer.m), ("v", self.optimizer.v)):
            for name, moment in moments.items():  # frozen parameters have none
                moment[...] = arrays[f"{group}.{name}"]
        if self.state.best_score is not None:
            self.best = {name: arrays[f"best.{name}"] for name in self.params}
        return True

    def keep_best(self) -> None:
        """Copy the parameters as they are now."""
        self.best = {name: p.copy() for name, p in self.params.items()}

    def restore_best(self) -> None:
        """Give the parameters the best values, where there are any."""
        for name, p in self.params.items() if self.best is not None else ():
            p[...] = self.best[name]  # type: ignore[index]


def identify(
    config: TrainingConfig, params: Params, data: Dataset, validation: Dataset | None = None
) -> dict[str, Any]:
    """What makes a training this one: its settings, its parameters' shapes and its data."""
    settings = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in asdict(config).items()
        if k != "checkpoint_seconds"
    }
    shapes = repr([(name, p.shape) for name, p in leaves(params)])
    return {
        **settings,
        "parameters": zlib.crc32(shapes.encode()),
        "data": _checksum(data),
        "validation_data": None if validation is None else _checksum(validation),
    }


def _checksum(data: Dataset) -> int:
    crc = 0
    labels = () if data.labels is None else (data.labels,)  # None's bytes are an address in memory
    for array in (*labels, *data.sequences):
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, which must not be left half done."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # no KeyboardInterrupt comes here
        return
    pressed: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        previous(*pressed[0])

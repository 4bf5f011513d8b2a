"""What a training leaves on disk: checkpoints, the history and its plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedattn._whole import whole_file
from fusedattn.nn import Array

CHECKPOINT, HISTORY = "checkpoint.safetensors", "history.jsonl"


def write_checkpoint(folder: Path, arrays: Mapping[str, Array], state: dict[str, Any]) -> None:
    """Write the checkpoint: one safetensors file, the state as JSON in its metadata."""
    from safetensors.numpy import save_file

    metadata = {"state": json.dumps(state)}
    with whole_file(folder / CHECKPOINT) as path:
        save_file(dict(arrays), str(path), metadata)


def read_checkpoint(folder: Path) -> tuple[dict[str, Array], dict[str, Any]] | None:
    """The arrays and the state of the checkpoint, None where there is none."""
    from safetensors import safe_open

    if not (folder / CHECKPOINT).is_file():
        return None
    with safe_open(str(folder / CHECKPOINT), framework="np") as file:
        state = json.loads(file.metadata()["state"])
        return {name: file.get_tensor(name) for name in file.keys()}, state


def remove_checkpoint(folder: str | Path) -> None:
    """Delete the checkpoint, if there is one: the model has been saved."""
    (Path(folder) / CHECKPOINT).unlink(missing_ok=True)


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write history.jsonl, a line an evaluation."""
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    with whole_file(folder / HISTORY) as path:
        path.write_text(lines, encoding="utf-8")


def read_history(folder: Path) -> list[dict[str, float]]:
    """The lines of history.jsonl."""
    return [json.loads(line) for line in (folder / HISTORY).read_text("utf-8").splitlines()]


def plot_history(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw the losses and, where there are any, the other metrics against the epoch.

    Parameters
    ----------
    history : sequence of dict
        As in `TrainingResult.history`.
    path : path
        Of the picture; its ending (png, svg, pdf) says which kind.
    """
    from matplotlib.figure import Figure

    epochs = [entry["epoch"] for entry in history]
    shares = [m for m in ("accuracy", "macro_f1") if history and m in history[-1]]
    figure = Figure(figsize=(10 if shares else 5, 3.5), layout="constrained")
    panels = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
    marker = "o" if len(history) < 30 else None
    for panel, names, label in zip(
        panels, (("train_loss", "loss"), shares), ("loss (nats)", "share"), strict=False
    ):
        for name in (n for n in names if history and n in history[-1]):
            title = {"train_loss": "training", "loss": "validation", "macro_f1": "macro-F1"}
            values = [entry[name] for entry in history]
            panel.plot(epochs, values, marker=marker, label=title.get(name, name))
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(str(path), dpi=150)

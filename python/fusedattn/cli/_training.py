"""Options that say how to train, and what of them makes a training what it is."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedattn.cli import _threads

if TYPE_CHECKING:
    from fusedattn.train import TrainingConfig

# What may differ when a training goes on. (Of the data, a checkpoint has a checksum.)
MAY_DIFFER = ("data", "test", "out", "restart", "threads", "checkpoint_seconds", "seeds", "func")


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """What `TrainingConfig` holds, and where it all goes."""
    from fusedattn.train import TrainingConfig

    known = asdict(TrainingConfig(**defaults))
    group = parser.add_argument_group("training")
    for name, kind, text in (
        ("epochs", int, ""),
        ("max_sentences", int, "texts a batch"),
        ("max_tokens", int, "tokens a batch"),
        ("accumulate", int, "batches a step"),
        ("learning_rate", float, "at its peak"),
        ("warmup", float, "share of the training in which the rate rises"),
        ("weight_decay", float, ""),
        ("max_grad_norm", float, ""),
        ("label_smoothing", float, ""),
        ("layer_decay", float, "each block's rate as a multiple of that of the block above"),
        ("evaluate_every", int, "steps [an epoch]"),
        ("patience", int, "evaluations without a better one before stopping [no stopping]"),
        ("checkpoint_seconds", float, "between checkpoints"),
        ("seed", int, "of weights, order and dropout"),
    ):
        shown = f"{text} [%(default)s]".lstrip() if known[name] is not None else text
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=known[name], help=shown, metavar="N")
    group.add_argument("--schedule", choices=("linear", "cosine"), default=known["schedule"])
    group.add_argument(
        "--freeze", nargs="*", default=[], metavar="NAME", help="beginnings of names"
    )
    _threads.add_option(group)
    group.add_argument("--restart", action="store_true", help="begin anew, whatever --out holds")


def training_config(args: argparse.Namespace, **others: Any) -> TrainingConfig:
    """The options as a config."""
    from fusedattn.train import TrainingConfig

    given = {f.name: getattr(args, f.name) for f in fields(TrainingConfig) if hasattr(args, f.name)}
    given["freeze"] = tuple(args.freeze)
    return TrainingConfig(**{**given, **others})


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make a training what it is."""
    return {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(args).items()
        if k not in MAY_DIFFER
    }

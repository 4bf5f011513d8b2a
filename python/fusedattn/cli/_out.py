"""The folder --out of a training: whether to go on from what it holds, and what is left in it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedattn._whole import whole_file


def check_out(out: Path, restart: bool, parts: Sequence[Path] = ()) -> bool:
    """Whether to go on from a checkpoint in `out`; an error where a finished model is there.

    `parts` are folders of earlier trainings of the same command.
    """
    from fusedattn.train import CHECKPOINT

    if restart:
        return False
    if any((folder / CHECKPOINT).exists() for folder in (out, *parts)):
        print(f"Going on from the checkpoint in {out} (--restart begins anew).", file=sys.stderr)
        return True
    if (out / "config.json").exists():
        raise ValueError(f"--out: {out} holds a model already; --restart replaces it")
    return False


def again(restart: bool) -> str:
    """What to type to go on with what was broken off, as the beginning of a sentence."""
    return "The same command without --restart" if restart else "The same command"


def interrupted(args: argparse.Namespace) -> str:
    """What to say after Ctrl-C."""
    return f"Interrupted. {again(args.restart)} goes on from the checkpoint in {args.out}."


def finish(out: Path, model: Any, result: Any, settings: dict[str, Any]) -> str:
    """Save the model, the curves and the settings; no checkpoint is needed any more.

    Returns what was written, in words.
    """
    from fusedattn import __version__
    from fusedattn.train import plot_history, remove_checkpoint

    model.save_pretrained(out)
    wrote = "the model, history.jsonl, settings.json"
    with contextlib.suppress(ModuleNotFoundError):  # matplotlib is an extra
        if result.history:
            plot_history(result.history, out / "curves.png")
            wrote += ", curves.png"
    clean = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items() if k != "func"}
    clean = {"version": __version__, **clean}
    with whole_file(out / "settings.json") as path:
        path.write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
    remove_checkpoint(out)
    return wrote

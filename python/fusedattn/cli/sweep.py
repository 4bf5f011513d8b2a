"""``fusedattn sweep``: how wide should the vectors be?"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedattn._whole import whole_file
from fusedattn.cli import _out, _threads, finetune

if TYPE_CHECKING:
    from fusedattn.text import Examples

TABLE, PLOT = "sweep.jsonl", "sweep.png"
NOT_SETTINGS = ("out", "dim", "seeds", "seed", "restart", "threads", "func", "checkpoint_seconds")


def add_parser(subparsers: Any) -> None:
    """Add this command and its options: those of finetune, but a list of widths."""
    parser = subparsers.add_parser(
        "sweep",
        conflict_handler="resolve",
        description="Train a classifier of each width, with several seeds, and compare them on the "
        "texts to choose by: a table, sweep.jsonl and a plot. What --out holds already is not "
        "trained again, and what was broken off goes on.",
    )
    finetune.add_options(parser, out="sweep")
    parser.add_argument(
        "--dim",
        type=widths,
        default=[32, 64, 128],
        metavar="N,N,...",
        help="widths of the vectors [32,64,128]",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs a width [1]")
    parser.set_defaults(func=run)


def widths(text: str) -> list[int]:
    """Numbers from "32,64,128"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 32,64,128, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    """Train what is missing, then print and draw the comparison; 130 after Ctrl-C."""
    from fusedattn.train import remove_checkpoint

    if args.start:
        raise ValueError("--from: a pre-trained encoder has its width already")
    if not args.validation and not args.validation_share:
        raise ValueError("--validation-share: expected more than 0, to compare the widths by")
    if args.seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {args.seeds}")
    for dim in args.dim:
        if dim < 1 or args.heads < 1 or dim % args.heads:
            raise ValueError(f"--dim: expected multiples of --heads ({args.heads}), got {dim}")
    examples = finetune.read(args)
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    settings["texts"] = checksum(examples)
    if args.restart:  # what is broken off now must not be mixed with what was there
        (args.out / TABLE).unlink(missing_ok=True)
        for folder in args.out.glob("dim*-seed*"):
            remove_checkpoint(folder)
    runs = read_runs(args.out / TABLE, settings)
    done = {(entry["dim"], entry["seed"]) for entry in runs}
    wanted = [(dim, args.seed + n) for dim in dict.fromkeys(args.dim) for n in range(args.seeds)]
    with _threads.limited_to(args.threads):
        for dim, seed in (pair for pair in wanted if pair not in done):
            print(f"width {dim}, seed {seed}:", end=" ", flush=True)
            out = args.out / f"dim{dim}-seed{seed}"
            one = argparse.Namespace(**{**vars(args), "dim": dim, "seed": seed, "out": out})
            _, result, report = finetune.train(one, examples, resume=not args.restart)
            if result.interrupted:
                print(_out.interrupted(args))
                return 130
            entry = {"dim": dim, "seed": seed, **report, "settings": settings}
            runs.append(entry)
            write_runs(args.out / TABLE, runs)
            remove_checkpoint(out)
    chosen = [entry for entry in runs if (entry["dim"], entry["seed"]) in wanted]
    print("\n" + table(chosen))
    plot(chosen, args.out / PLOT)
    print(f"Wrote {TABLE}, {PLOT} and the histories to {args.out}.")
    return 0


def checksum(examples: tuple[Examples, Examples]) -> int:
    """Of all texts and labels: with others a run would have come out differently."""
    return zlib.crc32(json.dumps([[part.texts, part.labels] for part in examples]).encode())


def read_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier sweep with the same settings measured."""
    if not path.exists():
        return []
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    unlike = {k for run in runs for k, v in run["settings"].items() if settings.get(k) != v}
    if unlike:
        raise ValueError(
            f"--out: {path} is of another sweep, which differs in {sorted(unlike)}; "
            "--restart replaces it"
        )
    return runs


def write_runs(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write a line a run, sorted."""
    lines = [json.dumps(run) + "\n" for run in sorted(runs, key=lambda r: (r["dim"], r["seed"]))]
    with whole_file(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def table(runs: list[dict[str, Any]]) -> str:
    """A line a width: its parameters, accuracy (mean and standard deviation) and speed."""
    lines = [
        f"{'width':>6}{'parameters':>13}{'accuracy':>11}{'+-':>6}{'tokens/s':>11}{'seconds':>9}"
    ]
    for dim in sorted({run["dim"] for run in runs}):
        same = [run for run in runs if run["dim"] == dim]
        scores = [100 * run["validation_accuracy"] for run in same]
        spread = f"{np.std(scores, ddof=1):.2f}" if len(scores) > 1 else "-"
        speed = np.mean([run["tokens_per_second"] for run in same])
        seconds = np.mean([run["seconds"] for run in same])
        lines.append(
            f"{dim:>6}{same[0]['parameters']:>13,}{np.mean(scores):>9.2f} %{spread:>6}"
            f"{speed:>11,.0f}{seconds:>9.0f}"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against width, a dot a run and a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    dims = sorted({run["dim"] for run in runs})
    means = [
        np.mean([100 * run["validation_accuracy"] for run in runs if run["dim"] == dim])
        for dim in dims
    ]
    axes.plot(dims, means, label="mean")
    axes.plot(
        [run["dim"] for run in runs],
        [100 * run["validation_accuracy"] for run in runs],
        "o",
        label="run",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.set_xlabel("width of the vectors")
    axes.set_ylabel("validation accuracy (%)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(str(path), dpi=150)

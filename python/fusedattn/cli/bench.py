"""``fusedattn bench``: a table of what attention costs here, ours beside NumPy's and PyTorch's."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["add_parser", "run"]

ROW = "{:12} {:27} {:8} {:>9} {:>13} {:>6} {:>9} {:>9} {:>7} {:>8}"
HEAD = "case|shape|pass|ms|rate|limit|NumPy ms|torch ms|x NumPy|x torch".split("|")


def add_parser(subparsers: Any) -> None:
    """Add the command ``bench`` to an argparse sub-parser collection."""
    from fusedattn.bench import CASES

    parser = subparsers.add_parser(
        "bench",
        description="Measure attention, forward and backward, against NumPy and, where it is "
        "installed, PyTorch. 'limit' is the share of the multiply-add peak, or of the read "
        "bandwidth where that bounds the case, measured in the same run with the same threads.",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads for everyone")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the shares (png, svg, pdf)")
    parser.add_argument(
        "--neighbour",
        action="store_true",
        help="instead, alternate attention with np.matmul and show what the pair costs",
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, and write what was asked for."""
    if options.neighbour:
        from fusedattn.bench import neighbour

        if options.cases or options.plot or options.threads:
            print("fusedattn bench: --neighbour goes with --quick and --json only", file=sys.stderr)
            return 2
        return neighbour.main(options.json, quick=options.quick)

    from fusedattn import get_num_threads
    from fusedattn.bench import CASES

    threads = options.threads or get_num_threads()
    cases = [CASES[name] for name in options.cases or CASES]
    about = surroundings(threads)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n" + ROW.format(*HEAD))
    results = []
    with blas_threads(threads):
        for result in measured(cases, threads, quick=options.quick):
            print(row(result), flush=True)
            results.append(result)
    peaks = {r.case.dtype: [s.limits.flops for s in results if s.case.dtype == r.case.dtype]
             for r in results}  # fmt: skip
    for dtype, values in peaks.items():
        print(f"{dtype} peak {min(values) / 1e9:.0f} to {max(values) / 1e9:.0f} GFLOP/s", end="; ")
    bandwidth = [r.limits.bytes / 1e9 for r in results]
    print(f"read bandwidth {min(bandwidth):.1f} to {max(bandwidth):.1f} GB/s")

    if options.json:
        record = {"about": about, "results": [r.as_dict() for r in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from fusedattn.bench.plot import plot_shares

        plot_shares(results, options.plot, title=f"{about['cpu']}, {threads} threads")
    return 0


def measured(cases: list[Any], threads: int, *, quick: bool) -> Iterator[Any]:
    """Measure case by case; the progress goes to stderr, and only if someone looks at it."""
    from fusedattn.bench import Problem, contenders, measure

    rounds, seconds = (3, 0.3) if quick else (5, 1.0)
    total = sum(len(case.directions) for case in cases)
    done = 0
    for case in cases:
        problem = Problem(case)
        for direction in case.directions:
            done += 1
            with progress(f"{case.name} {direction} ({done}/{total})"):
                rivals = contenders(problem, direction, threads)
                result = measure(
                    case, direction, rivals, threads, min_rounds=rounds, seconds=seconds
                )
            yield result


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Show ``text`` on a terminal while the block runs."""
    shown = sys.stderr.isatty()
    if shown:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)


def row(result: Any) -> str:
    """One line of the table; "-" stands for a contender that was not there."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    unit = "GB/s" if result.memory_bound else "GFLOP/s"
    ms = [
        cell(s and s * 1e3, "{:.2f}")
        for s in map(result.seconds, ("fusedattn", "numpy", "pytorch"))
    ]
    return ROW.format(
        result.case.name,
        result.case.shape,
        result.direction,
        ms[0],
        f"{result.rate() / 1e9:.1f} {unit}",
        f"{100 * result.share():.0f} %",
        *ms[1:],
        cell(result.speedup("numpy"), "{:.1f}"),
        cell(result.speedup("pytorch"), "{:.2f}"),
    ).rstrip()


def surroundings(threads: int) -> dict[str, Any]:
    """What a figure depends on besides the code: machine, instruction set, threads, versions."""
    import fusedattn

    facts = fusedattn.cpu_info()
    about = {
        "fusedattn": fusedattn.__version__,
        "cpu": facts["cpu"],
        "isa": facts["isa"],
        "threads": threads,
        "parallel": facts["parallel"],
        "compiler": facts["compiler"],
        "python": platform.python_version(),
    }
    for package in ("numpy", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[package] = importlib.metadata.version(package)
    return about


def blas_threads(threads: int) -> contextlib.AbstractContextManager[Any]:
    """Give NumPy's BLAS the same threads where threadpoolctl is installed to say so."""
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[Any] = threadpool_limits(threads, user_api="blas")
    return limits


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

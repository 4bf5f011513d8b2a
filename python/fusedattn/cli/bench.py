"""``fusedattn bench``: a table of what attention costs here, ours beside NumPy's and PyTorch's."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedattn.bench.surroundings import blas_threads, chosen_isa, surroundings, write_json

__all__ = ["add_parser", "run"]

ROW = "{:12} {:30} {:8} {:>9} {:>13} {:>6} {:>9} {:>9} {:>7} {:>8}"
HEAD = "case|shape|pass|ms|rate|limit|NumPy ms|torch ms|x NumPy|x torch".split("|")
# What each of the other measurements takes besides its own flag.
TAKES = {
    "neighbour": {"quick", "json"},
    "ratios": {"quick", "json", "threads", "isa", "case"},
    "lengths": {"quick", "json", "threads", "isa", "plot"},
    "scaling": {"quick", "json", "threads", "isa", "plot", "case", "dtype"},
    "training": {"quick", "json", "isa", "case"},
}


def add_parser(subparsers: Any) -> None:
    """Add the command ``bench`` to an argparse sub-parser collection."""
    from fusedattn.bench import CASES
    from fusedattn.bench.cases import DTYPES

    parser = subparsers.add_parser(
        "bench",
        description="Measure attention, forward and backward, against NumPy and, where it is "
        "installed, PyTorch. 'limit' is the share of the multiply-add peak, or of the read "
        "bandwidth where that bounds the case, measured in the same run with the same threads.",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads for everyone")
    parser.add_argument("--isa", metavar="NAME", help="instruction set for ours (see info)")
    parser.add_argument(
        "--case",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"names, or patterns such as 'long*', of {', '.join(CASES)}",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=[], help="measure every shape in these"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table (png, svg, pdf)")
    parser.add_argument(
        "--roofline", type=Path, metavar="FILE", help="draw the rates under the machine's limits"
    )
    other = parser.add_argument_group("other measurements").add_mutually_exclusive_group()
    other.add_argument(
        "--ratios",
        action="store_true",
        help="what a rule, a layout or packing costs beside a plain call of ours",
    )
    other.add_argument(
        "--lengths", action="store_true", help="time and memory of one head up to 65536 keys"
    )
    other.add_argument(
        "--scaling", action="store_true", help="speedup of ours with 1, 2, 4, ... threads"
    )
    other.add_argument(
        "--neighbour",
        action="store_true",
        help="attention in turns with np.matmul, and what the pair costs",
    )
    other.add_argument(
        "--training", action="store_true", help="a training step of an encoder beside PyTorch's"
    )
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, and write what was asked for."""
    mode = next((name for name in TAKES if getattr(options, name)), None)
    if mode:
        every = {"threads", "isa", "case", "dtype", "quick", "json", "plot", "roofline"}
        extra = [f"--{n}" for n in sorted(every - TAKES[mode]) if getattr(options, n)]
        if extra:
            print(f"fusedattn bench: --{mode} does not take {extra[0]}", file=sys.stderr)
            return 2
    try:
        with chosen_isa(options.isa):
            return MODES[mode](options)
    except ValueError as error:
        print(f"fusedattn bench: {error}", file=sys.stderr)
        return 2


def table(options: argparse.Namespace) -> int:
    """The table of all cases, ours beside the others'."""
    from fusedattn.bench.cases import select

    cases = select(options.case, options.dtype)
    about = opening(options.threads, ROW.format(*HEAD))
    threads = about["threads"]
    results = []
    with blas_threads(threads):
        for result in measured(cases, threads, quick=options.quick):
            print(row(result), flush=True)
            results.append(result)
    peaks: dict[str, list[float]] = {}
    for r in results:
        peaks.setdefault(r.case.dtype, []).append(r.limits.flops / 1e9)
    for dtype, values in peaks.items():
        print(f"{dtype} peak {min(values):.0f} to {max(values):.0f} GFLOP/s", end="; ")
    bandwidth = [r.limits.bytes / 1e9 for r in results]
    print(f"read bandwidth {min(bandwidth):.1f} to {max(bandwidth):.1f} GB/s")

    if options.json:
        write_json(options.json, about, [r.as_dict() for r in results])
    title = f"{about['cpu']}, {about['isa']}, {threads} threads"
    if options.plot or options.roofline:
        from fusedattn.bench import plot

        if options.plot:
            plot.plot_shares(results, options.plot, title=title)
        if options.roofline:
            plot.plot_roofline(results, options.roofline, title=title)
    return 0


def neighbour(options: argparse.Namespace) -> int:
    """Attention and BLAS sharing the cores."""
    from fusedattn.bench import neighbour

    return neighbour.main(options.json, quick=options.quick)


def ratios(options: argparse.Namespace) -> int:
    """Ours against ours."""
    from fusedattn.bench.comparisons import matching
    from fusedattn.bench.ratios import Row, compare

    about = opening(options.threads, Row.head())
    rows = []
    for comparison in matching(options.case):
        for found in compare(comparison, about["threads"], quick=options.quick):
            print(found.line(), flush=True)
            rows.append(found)
    missed = [r for r in rows if not r.met]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} within their ratio")
    if options.json:
        write_json(options.json, about, [r.as_dict() for r in rows])
    return 0


def lengths(options: argparse.Namespace) -> int:
    """Time and memory against length."""
    from fusedattn.bench.lengths import exponent, measure_lengths

    line = "{:>6} {:>11} {:>13} {:>12} {:>13} {:>12}"
    head = line.format("S", "forward ms", "rate", "backward ms", "rate", "scratch")
    about = opening(options.threads, head)
    threads = about["threads"]
    points = []
    for p in measure_lengths(threads, about["isa"], quick=options.quick):
        points.append(p)
        cells = [
            cell
            for direction in ("forward", "backward")
            for cell in (
                f"{getattr(p, direction) * 1e3:.2f}",
                f"{p.rate(direction) / 1e9:.0f} GFLOP/s",
            )
        ]
        print(line.format(p.s, *cells, f"{p.scratch / 2**20:.1f} MiB"), flush=True)
    slopes = {direction: exponent(points, direction) for direction in ("forward", "backward")}
    print("time grows as S to the " + ", ".join(f"{x:.2f} ({n})" for n, x in slopes.items()))
    if options.json:
        write_json(options.json, about, [p.as_dict() for p in points])
    if options.plot:
        from fusedattn.bench.plot import plot_lengths

        plot_lengths(points, slopes, options.plot, title=f"{about['cpu']}, {threads} threads")
    return 0


def scaling(options: argparse.Namespace) -> int:
    """Ours on more and more threads."""
    from fusedattn.bench import Problem
    from fusedattn.bench.cases import select
    from fusedattn.bench.scaling import DEFAULT_CASES, Scaling, measure_scaling

    cases = select(options.case or DEFAULT_CASES, options.dtype)
    about = opening(options.threads, Scaling.head())
    curves = []
    for problem in map(Problem, cases):
        for direction in problem.case.directions:
            with progress(f"{problem.case.name} {direction}"):
                curve = measure_scaling(problem, direction, about["threads"], quick=options.quick)
            print("\n".join(curve.lines()), flush=True)
            curves.append(curve)
    if options.json:
        write_json(options.json, about, [c.as_dict() for c in curves])
    if options.plot:
        from fusedattn.bench.plot import plot_scaling

        plot_scaling(curves, options.plot, title=f"{about['cpu']}, {about['isa']}")
    return 0


def training(options: argparse.Namespace) -> int:
    """A training step, ours beside PyTorch's."""
    from fusedattn.bench import training

    return training.main(options.json, quick=options.quick, patterns=options.case)


MODES = {
    None: table,
    "ratios": ratios,
    "lengths": lengths,
    "scaling": scaling,
    "neighbour": neighbour,
    "training": training,
}


def opening(threads: int | None, head: str) -> dict[str, Any]:
    """Print the surroundings, and the head of a table under them; ours default to all threads."""
    from fusedattn import get_num_threads

    about = surroundings(threads or get_num_threads())
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n" + head)
    return about


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
        cell(s and s * 1e3, "{:.2f}" if (s or 1) > 1e-3 else "{:.4f}")
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

"""Pictures of a benchmark's results: shares of limits, the roofline, cost by length and threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fusedattn.bench.lengths import Point
from fusedattn.bench.scaling import Scaling
from fusedattn.bench.timing import Result

__all__ = ["plot_lengths", "plot_roofline", "plot_scaling", "plot_shares"]

LABELS = {"fusedattn": "fusedattn", "pytorch": "PyTorch", "numpy": "NumPy"}


def plot_shares(results: Sequence[Result], path: Path, *, title: str = "") -> None:
    """Draw, for each case, the share of its limit that each contender reaches.

    Parameters
    ----------
    results : sequence of Result
        What was measured.
    path : Path
        The file; its suffix says the format.
    title : str, optional
        A line above the plots.
    """
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(r.direction for r in results))
    figure = Figure(
        figsize=(6 * len(directions), 1.2 + 0.5 * len(results) / len(directions)), layout="tight"
    )
    panels = figure.subplots(1, len(directions), squeeze=False)[0]
    for panel, direction in zip(panels, directions, strict=True):
        rows = [r for r in results if r.direction == direction][::-1]
        for offset, (name, label) in zip((0.27, 0.0, -0.27), LABELS.items(), strict=True):
            shares = [100 * (r.share(name) or 0.0) for r in rows]
            panel.barh([i + offset for i in range(len(rows))], shares, height=0.25, label=label)
        names = [r.case.name + (" (bandwidth)" if r.memory_bound else "") for r in rows]
        panel.set_yticks(range(len(rows)), names)
        panel.set_xlim(0, 105)
        panel.set_xlabel("% of the multiply-add peak measured in the same run")
        panel.set_title(direction)
        panel.grid(axis="x", alpha=0.3)
    panels[0].legend(loc="upper right", bbox_to_anchor=(1.0, 1.12), ncols=3, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_roofline(results: Sequence[Result], path: Path, *, title: str = "") -> None:
    """Draw what is achieved over arithmetic intensity, under the machine's two limits.

    The roof rises with the read bandwidth and ends flat at the multiply-add peak of each dtype
    (Williams, Waterman and Patterson, 2009, "Roofline"). Filled marks are ours, open ones
    PyTorch's; circles forward, triangles backward.

    Parameters
    ----------
    results : sequence of Result
        What was measured.
    path : Path
        The file; its suffix says the format.
    title : str, optional
        A line above the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="tight")
    axes = figure.subplots()
    bandwidth = max(r.limits.bytes for r in results)
    intensities = [r.intensity for r in results]
    left, right = min(intensities) / 2, max(intensities) * 2
    for colour, dtype in enumerate(dict.fromkeys(r.case.dtype for r in results)):
        mine = [r for r in results if r.case.dtype == dtype]
        peak = max(r.limits.flops for r in mine)
        ridge = peak / bandwidth
        roof_x = [x for x in (left, ridge) if x <= ridge] + [max(right, ridge)]
        roof_y = [min(peak, x * bandwidth) / 1e9 for x in roof_x]
        label = f"{dtype}: {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
        axes.plot(roof_x, roof_y, color=f"C{colour}", linewidth=1, label=label)
        for r in mine:
            for name, fill in (("fusedattn", f"C{colour}"), ("pytorch", "none")):
                seconds = r.seconds(name)
                if seconds:
                    achieved = r.case.flops(r.direction) / seconds / 1e9
                    marker = "o" if r.direction == "forward" else "^"
                    axes.scatter(
                        r.intensity, achieved, marker=marker, color=fill, edgecolors=f"C{colour}"
                    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops that count for each byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", frameon=False)
    axes.set_title(f"{title}\nfilled ours, open PyTorch's; circles forward, triangles backward")
    figure.savefig(path, dpi=150)


def plot_lengths(
    points: Sequence[Point], slopes: dict[str, float], path: Path, *, title: str = ""
) -> None:
    """Draw time and scratch memory over length, both axes logarithmic.

    Parameters
    ----------
    points : sequence of Point
        What was measured.
    slopes : dict of str to float
        The fitted exponent of each direction.
    path : Path
        The file; its suffix says the format.
    title : str, optional
        A line above the plots.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="tight")
    time, memory = figure.subplots(1, 2)
    s = [p.s for p in points]
    for direction, slope in slopes.items():
        seconds = [getattr(p, direction) for p in points]
        time.plot(s, seconds, marker="o", label=f"{direction}, exponent {slope:.2f}")
    time.set_ylabel("seconds")
    memory.plot(s, [p.scratch / 2**20 for p in points], marker="o", label="scratch")
    arrays = [8 * p.s * 64 * 4 / 2**20 for p in points]  # q, k, v, o and their gradients
    memory.plot(s, arrays, linestyle="--", label="inputs and results")
    memory.plot(s, [p.s**2 * 4 / 2**20 for p in points], linestyle=":", label="a score matrix")
    memory.set_ylabel("MiB")
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("queries and keys, one head, D64")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_scaling(curves: Sequence[Scaling], path: Path, *, title: str = "") -> None:
    """Draw speedup over threads, beside the ideal and beside what the multiply-add peak gains.

    Parameters
    ----------
    curves : sequence of Scaling
        What was measured.
    path : Path
        The file; its suffix says the format.
    title : str, optional
        A line above the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="tight")
    axes = figure.subplots()
    for c in curves:
        kind = "" if c.case.dtype == "float32" else f" {c.case.dtype}"
        label = f"{c.case.name}{kind} {c.direction}"
        axes.plot(c.threads, [c.speedup(n) for n in c.threads], marker="o", label=label)
    for dtype in dict.fromkeys(c.case.dtype for c in curves):
        mine = [c for c in curves if c.case.dtype == dtype]
        counts = mine[0].threads
        gains = [median(c.peak_speedup(n) for c in mine) for n in counts]
        axes.plot(counts, gains, linestyle=":", label=f"multiply-add peak, {dtype}")
    counts = curves[0].threads
    axes.plot(counts, counts, color="grey", linestyle="--", label="ideal")
    for set_scale in (axes.set_xscale, axes.set_yscale):
        set_scale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_yticks(counts, map(str, counts))
    axes.minorticks_off()
    axes.set_xlabel("threads")
    axes.set_ylabel("times the speed of one thread")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title)
    figure.savefig(path, dpi=150)

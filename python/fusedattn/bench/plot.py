"""A picture of a benchmark's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedattn.bench.timing import Result

__all__ = ["plot_shares"]

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directions = list(dict.fromkeys(r.direction for r in results))
    figure = Figure(figsize=(6 * len(directions), 1.2 + 0.5 * len(results) / len(directions)))
    FigureCanvasAgg(figure)
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
    figure.tight_layout()
    figure.savefig(path, dpi=150)

"""Ours against ours: what a rule, a layout or packing costs beside the plain call.

A comparison times two calls in turns and takes the median of the rounds' ratios. Where the two do
different amounts of work, a factor makes up for it, so that the ratio says how much more was paid
than the work that was left to do. Each has a ratio that it should stay within.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from fusedattn.bench.timing import interleave

__all__ = ["Comparison", "Row", "Sides", "compare"]

ROW = "{:16} {:8} {:>9} {:>9} {:>6} {:>8}  {}"
HEAD = ("comparison", "pass", "ms", "beside ms", "ratio", "at most", "what beside what")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sides:
    """The two calls of a comparison, prepared.

    Attributes
    ----------
    ours, beside : callable
        What is asked about, and what it is compared with.
    factor : float
        Work of ``beside`` over work of ``ours``; the ratio of times is multiplied by it.
    """

    ours: Call
    beside: Call
    factor: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """One question.

    Attributes
    ----------
    name : str
        What ``fusedattn bench --ratios --case`` calls it.
    text : str
        What is set beside what.
    at_most : float
        The ratio to stay within.
    prepare : callable
        ``prepare(direction, threads)`` makes the data and gives the `Sides`.
    directions : tuple of str
        ``"forward"``, ``"backward"``.
    """

    name: str
    text: str
    at_most: float
    prepare: Callable[[str, int], Sides]
    directions: tuple[str, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Row:
    """The answer for one direction: median seconds of both calls, and the ratio."""

    comparison: Comparison
    direction: str
    ours: float
    beside: float
    ratio: float

    @property
    def met(self) -> bool:
        """Whether the ratio stays within what was asked."""
        return self.ratio <= self.comparison.at_most

    def line(self) -> str:
        """The row of the table, marked where the ratio is missed."""
        c, mark = self.comparison, "" if self.met else "  MISSED"
        ms = (f"{s * 1e3:.2f}" for s in (self.ours, self.beside))
        return (
            ROW.format(c.name, self.direction, *ms, f"{self.ratio:.2f}", f"{c.at_most:.2f}", c.text)
            + mark
        )

    def as_dict(self) -> dict[str, Any]:
        """The same in types that JSON knows."""
        return {
            "comparison": self.comparison.name,
            "text": self.comparison.text,
            "direction": self.direction,
            "ours_s": self.ours,
            "beside_s": self.beside,
            "ratio": self.ratio,
            "at_most": self.comparison.at_most,
        }

    @staticmethod
    def head() -> str:
        """The head of the table."""
        return ROW.format(*HEAD)


def compare(comparison: Comparison, threads: int, *, quick: bool = False) -> Iterator[Row]:
    """Time both sides of a comparison in turns, in each of its directions.

    Parameters
    ----------
    comparison : Comparison
        The question.
    threads : int
        Threads for both sides.
    quick : bool, default False
        Fewer rounds.

    Yields
    ------
    Row
    """
    for direction in comparison.directions:
        sides = comparison.prepare(direction, threads)
        rounds, seconds = (3, 0.2) if quick else (9, 1.0)
        samples = interleave(
            {"ours": sides.ours, "beside": sides.beside}, min_rounds=rounds, seconds=seconds
        )
        ratio = median(a / b for a, b in zip(samples["ours"], samples["beside"], strict=False))
        ours, beside = (median(samples[name]) for name in ("ours", "beside"))
        yield Row(comparison, direction, ours, beside, ratio * sides.factor)

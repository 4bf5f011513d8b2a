"""Ours against ours with more threads: speedup over one thread, and what of it the machine loses.

The thread counts of a case take turns, so that a speedup is a ratio within a round. Cores that
work together may run at a lower clock than one alone; the multiply-add peak, measured with the same
threads in the same run, says how much of the speedup that is missing is the machine's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from fusedattn.bench.cases import Case, Problem
from fusedattn.bench.implementations import FusedAttention
from fusedattn.bench.timing import interleave

__all__ = ["DEFAULT_CASES", "Scaling", "measure_scaling", "thread_counts"]

DEFAULT_CASES = ("bert-512", "long-d64")
ROW = "{:12} {:30} {:8} {:>7} {:>9} {:>7} {:>10} {:>7} {:>15}"
HEAD = "case|shape|pass|threads|ms|speedup|efficiency|of peak|peak efficiency".split("|")


@dataclass(frozen=True)
class Scaling:
    """One case in one direction, by number of threads.

    Attributes
    ----------
    case : Case
        The problem.
    direction : str
        ``"forward"`` or ``"backward"``.
    samples : dict of int to list of float
        Seconds of one call, round by round; one thread has every round.
    peaks : dict of int to float
        Multiply-add peak for the case's dtype with that many threads, FLOP/s.
    """

    case: Case
    direction: str
    samples: dict[int, list[float]] = field(repr=False)
    peaks: dict[int, float]

    @property
    def threads(self) -> list[int]:
        """The numbers of threads, ascending."""
        return list(self.samples)

    def seconds(self, n: int) -> float:
        """Median seconds of a call on ``n`` threads."""
        return median(self.samples[n])

    def speedup(self, n: int) -> float:
        """How many times faster than one thread: the median of the rounds' ratios."""
        pairs = zip(self.samples[1], self.samples[n], strict=False)
        return median(one / more for one, more in pairs)

    def efficiency(self, n: int) -> float:
        """The part of ``n`` times the speed of one thread that is reached."""
        return self.speedup(n) / n

    def share(self, n: int) -> float:
        """The part of the multiply-add peak of ``n`` threads that is reached."""
        return self.case.flops(self.direction) / self.seconds(n) / self.peaks[n]

    def peak_speedup(self, n: int) -> float:
        """How many times higher the multiply-add peak is than that of one thread."""
        return self.peaks[n] / self.peaks[1]

    def peak_efficiency(self, n: int) -> float:
        """What `efficiency` would be of a computation that loses nothing but clock."""
        return self.peak_speedup(n) / n

    def lines(self) -> list[str]:
        """The rows of the table."""
        about = (self.case.name, self.case.shape, self.direction)
        digits = 2 if self.seconds(self.threads[-1]) > 1e-3 else 4
        rows = []
        for n in self.threads:
            ms, speedup = f"{self.seconds(n) * 1e3:.{digits}f}", f"{self.speedup(n):.2f}"
            parts = (self.efficiency(n), self.share(n), self.peak_efficiency(n))
            rows.append(ROW.format(*about, n, ms, speedup, *(f"{100 * x:.0f} %" for x in parts)))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, in types that JSON knows."""
        return {
            "case": asdict(self.case),
            "direction": self.direction,
            "flops": self.case.flops(self.direction),
            "by_threads": [
                {
                    "threads": n,
                    "median_s": self.seconds(n),
                    "samples_s": self.samples[n],
                    "speedup": self.speedup(n),
                    "efficiency": self.efficiency(n),
                    "peak_flops_per_s": self.peaks[n],
                    "share_of_peak": self.share(n),
                    "peak_efficiency": self.peak_efficiency(n),
                }
                for n in self.threads
            ],
        }

    @staticmethod
    def head() -> str:
        """The head of the table."""
        return ROW.format(*HEAD)


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, 8 and so on below ``most``, then ``most`` itself."""
    return [n for n in (2**i for i in range(most.bit_length())) if n < most] + [most]


def measure_scaling(
    problem: Problem, direction: str, threads: int, *, quick: bool = False
) -> Scaling:
    """Time ``direction`` on every number of threads, in turns, between two looks at the peaks.

    Parameters
    ----------
    problem : Problem
        The case and its data.
    direction : {"forward", "backward"}
        What to time.
    threads : int
        The largest number of threads; see `thread_counts`.
    quick : bool, default False
        Fewer rounds.

    Returns
    -------
    Scaling
    """
    from fusedattn import _core

    counts = thread_counts(threads)

    def peaks() -> dict[int, float]:
        return {n: _core.measure_peak(problem.case.dtype, n) for n in counts}

    calls = {str(n): getattr(FusedAttention(problem, n), direction) for n in counts}
    rounds, seconds = (3, 0.2) if quick else (7, 1.0)
    before = peaks()
    samples = interleave(calls, min_rounds=rounds, seconds=seconds)
    after = peaks()
    return Scaling(
        problem.case,
        direction,
        {n: samples[str(n)] for n in counts},
        {n: max(before[n], after[n]) for n in counts},
    )

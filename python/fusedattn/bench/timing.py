"""How contenders are timed against each other and against the machine's own limits.

A virtual machine's speed drifts by more than the differences of interest, so nothing is compared
across time: contenders take turns within a round, ratios are taken within a round, and medians of
those ratios are reported. The limits are measured in the same process, with the same threads, right
before and right after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from fusedattn.bench.cases import Case
from fusedattn.bench.implementations import Contender

__all__ = ["Limits", "Result", "interleave", "measure"]


@dataclass(frozen=True)
class Limits:
    """What the machine can do with this many threads.

    Attributes
    ----------
    flops : float
        Multiply-add peak for the dtype, FLOP/s: of bfloat16 dot products where the machine has
        such an instruction, else of float32, in which 16-bit types are computed; float64's own.
    bytes : float
        Read bandwidth of the memory, bytes/s.
    """

    flops: float
    bytes: float

    @classmethod
    def now(cls, dtype: str, threads: int) -> Limits:
        """Measure both, which takes some tenths of a second.

        The best instruction set of the machine is asked, whichever the contenders are held to: a
        limit belongs to the machine.
        """
        from fusedattn import _core

        return cls(_core.measure_peak(dtype, threads), _core.measure_bandwidth(threads))

    def highest(self, other: Limits) -> Limits:
        """The larger of each: a limit that was reached once stays a limit."""
        return Limits(max(self.flops, other.flops), max(self.bytes, other.bytes))


@dataclass(frozen=True)
class Result:
    """One case in one direction.

    Attributes
    ----------
    case : Case
        The problem.
    direction : str
        ``"forward"`` or ``"backward"``.
    limits : Limits
        The machine's, measured around the timing.
    samples : dict of str to list of float
        Seconds of one call for each contender, round by round; fusedattn's has every round, a slow
        contender may have left early.
    """

    case: Case
    direction: str
    limits: Limits
    samples: dict[str, list[float]] = field(repr=False)

    def seconds(self, name: str = "fusedattn") -> float | None:
        """Median seconds of a call, or None for a contender that was not there."""
        return median(self.samples[name]) if name in self.samples else None

    def rate(self, name: str = "fusedattn") -> float | None:
        """FLOP/s that count, or bytes/s where memory is the limit; None for who was not there."""
        seconds = self.seconds(name)
        work = self.case.bytes if self.memory_bound else self.case.flops
        return work(self.direction) / seconds if seconds else None

    @property
    def memory_bound(self) -> bool:
        """Whether moving the data takes longer than multiplying it, both at their limits."""
        by_bytes = self.case.bytes(self.direction) / self.limits.bytes
        return by_bytes > self.case.flops(self.direction) / self.limits.flops

    def share(self, name: str = "fusedattn") -> float | None:
        """The part of the limit that applies (peak or bandwidth) that a contender reaches."""
        rate = self.rate(name)
        limit = self.limits.bytes if self.memory_bound else self.limits.flops
        return rate / limit if rate else None

    def speedup(self, name: str) -> float | None:
        """How many times faster than contender ``name``: the median of the rounds' ratios."""
        if name not in self.samples:
            return None
        pairs = zip(self.samples[name], self.samples["fusedattn"], strict=False)
        return median(theirs / ours for theirs, ours in pairs)

    @property
    def intensity(self) -> float:
        """Flops that count for each byte that must cross the memory bus."""
        return self.case.flops(self.direction) / self.case.bytes(self.direction)

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, in types that JSON knows."""
        return {
            "case": {name: getattr(self.case, name) for name in self.case.__dataclass_fields__},
            "direction": self.direction,
            "flops": self.case.flops(self.direction),
            "bytes": self.case.bytes(self.direction),
            "peak_flops_per_s": self.limits.flops,
            "read_bytes_per_s": self.limits.bytes,
            "bound": "memory" if self.memory_bound else "compute",
            "contenders": {
                name: {
                    "median_s": median(samples),
                    "samples_s": samples,
                    "share_of_limit": self.share(name),
                    "fusedattn_is_faster_by": self.speedup(name),
                }
                for name, samples in self.samples.items()
            },
        }


def measure(
    case: Case,
    direction: str,
    rivals: Sequence[Contender],
    threads: int,
    *,
    min_rounds: int = 5,
    seconds: float = 2.0,
) -> Result:
    """Time ``direction`` of every contender, in turns, between two looks at the limits.

    Parameters
    ----------
    case : Case
        What the contenders were prepared for.
    direction : {"forward", "backward"}
        What to time.
    rivals : sequence of Contender
        The contenders, fusedattn first.
    threads : int
        Threads for the measurement of the limits; the contenders know theirs.
    min_rounds : int, default 5
        Rounds that everyone takes part in.
    seconds : float, default 2.0
        Time after which a contender that has its ``min_rounds`` leaves.

    Returns
    -------
    Result
    """
    calls = {rival.name: getattr(rival, direction) for rival in rivals}
    before = Limits.now(case.dtype, threads)
    samples = interleave(calls, min_rounds=min_rounds, seconds=seconds)
    limits = before.highest(Limits.now(case.dtype, threads))
    return Result(case, direction, limits, samples)


def interleave(
    calls: dict[str, Callable[[], Any]],
    *,
    min_rounds: int = 5,
    max_rounds: int = 50,
    seconds: float = 2.0,
    sample: float = 0.05,
) -> dict[str, list[float]]:
    """Time calls in turns.

    Parameters
    ----------
    calls : dict of str to callable
        What to time; the first name stays for every round.
    min_rounds, max_rounds : int, default 5 and 50
        Bounds on the samples of each.
    seconds : float, default 2.0
        Time after which a call that has ``min_rounds`` samples is left out.
    sample : float, default 0.05
        Least seconds of one sample; a shorter call is repeated within it, and half as often before
        it, so that threads are awake and caches warm.

    Returns
    -------
    dict of str to list of float
        Seconds of one call, a sample for each round.
    """
    inner, spent = {}, dict.fromkeys(calls, 0.0)
    for name, call in calls.items():
        call()  # first use: pages, threads, lazy set-up
        once = _clock(call, 1)
        inner[name] = max(1, round(sample / once))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    first = next(iter(calls))
    for _ in range(max_rounds):
        staying = [n for n in calls if len(samples[n]) < min_rounds or spent[n] < seconds]
        if not staying:
            break
        for name in dict.fromkeys([first, *staying]):
            call = calls[name]
            _settle()
            _clock(call, inner[name] // 2)
            elapsed = _clock(call, inner[name])
            samples[name].append(elapsed / inner[name])
            spent[name] += elapsed
    return samples


def _settle(longest: float = 0.5) -> None:
    """Wait until this process is idle.

    The previous contender's threads wait for their next work by spinning, OpenBLAS's for a tenth of
    a second, on the very cores that the next contender is about to be measured on.
    """
    end = time.perf_counter() + longest
    busy = True
    while busy and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.004)
        busy = time.process_time() - before > 0.001


def _clock(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start

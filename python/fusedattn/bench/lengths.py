"""Cost against length: time, rate and memory of one head up to 65536 queries and keys.

Each length runs in a fresh process, whose memory high-water mark nothing before has raised. The
scratch is what the mark lies above the inputs that were there before and the results: threads, code
and blocks. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np

__all__ = ["LENGTHS", "Point", "exponent", "measure_lengths", "measure_one"]

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
D = 64
CHILD = "from fusedattn.bench.lengths import measure_one; measure_one{arguments}"


@dataclass(frozen=True)
class Point:
    """One length: seconds of a pass, and bytes of scratch during both."""

    s: int
    forward: float
    backward: float
    scratch: int

    def rate(self, direction: str) -> float:
        """FLOP/s, of two products forward and five backward."""
        products = 2 if direction == "forward" else 5
        seconds: float = getattr(self, direction)
        return 2 * products * self.s**2 * D / seconds

    def as_dict(self) -> dict[str, float]:
        """In types that JSON knows."""
        return asdict(self)


def measure_lengths(threads: int, isa: str, *, quick: bool = False) -> Iterator[Point]:
    """Measure every length, each in a process of its own.

    Parameters
    ----------
    threads : int
        Threads of the calls.
    isa : str
        Instruction set.
    quick : bool, default False
        Up to 16384 only.

    Yields
    ------
    Point
    """
    for s in LENGTHS:
        if quick and s > 16384:
            return
        code = CHILD.format(arguments=(s, threads, isa, 0.5 if quick else 1.5))
        answer = subprocess.run(
            [sys.executable, "-c", code],
            # Arrays come from the system and go back to it: none lives in what another one left.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        yield Point(**json.loads(answer.stdout))


def exponent(points: list[Point], direction: str) -> float:
    """The slope of a line through log(seconds) over log(length), by least squares."""
    x = np.log([p.s for p in points])
    y = np.log([getattr(p, direction) for p in points])
    return float(np.polyfit(x, y, 1)[0])


def measure_one(s: int, threads: int, isa: str, seconds: float) -> None:
    """Measure one length in this process and print it as JSON."""
    from fusedattn import _core, attention, attention_backward

    _core.set_isa(isa)
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 1, s, D), dtype=np.float32) for _ in range(4))

    def forward() -> None:
        attention(q, k, v, num_threads=threads)

    before = _memory("VmRSS")
    out, lse = attention(q, k, v, return_lse=True, num_threads=threads)
    attention_backward(dout, q, k, v, out, lse, num_threads=threads)
    results = lse.nbytes + 4 * out.nbytes  # out, dq, dk and dv
    scratch = _memory("VmHWM") - before - results

    def backward() -> None:
        attention_backward(dout, q, k, v, out, lse, num_threads=threads)

    times = {}
    for name, call in (("forward", forward), ("backward", backward)):
        taken: list[float] = []
        while sum(taken) < seconds:
            start = perf_counter()
            call()
            taken.append(perf_counter() - start)
        times[name] = float(np.median(taken))
    json.dump(Point(s, scratch=scratch, **times).as_dict(), sys.stdout)


def _memory(what: str) -> int:
    """Bytes of this process: ``VmRSS`` in memory now, ``VmHWM`` at most so far.

    Not ``getrusage``, whose mark a process inherits from the one that started it.
    """
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith(what))
    return int(line.split()[1]) * 1024

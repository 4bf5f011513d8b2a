"""Does attention share the cores with NumPy's BLAS?

A NumPy pipeline alternates our calls with ``np.matmul``. Each side has threads that wait for work,
and a thread that waits by spinning takes a core from the other side. So: attention alone, the
matrix product alone, then both in turns; a good neighbour's pair takes hardly longer than the sum.
Which OpenMP runtime a process gets depends on who was imported first, hence the same measurement in
a fresh process after each of: nothing, PyTorch, scikit-learn, imported and used.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

__all__ = ["alternate", "main", "measure_pairs"]

TARGET = 1.1
"""The pair's time over the sum of the two alone that a good neighbour stays under."""

ATTENTION = {
    "B1 H4 S32 D32": (1, 4, 32, 32),
    "B1 H12 S128 D64": (1, 12, 128, 64),
    "B8 H12 S128 D64": (8, 12, 128, 64),
    "B8 H12 S512 D64": (8, 12, 512, 64),
}
PRODUCTS = {"4096x64x64": (4096, 64, 64), "4096x256x1024": (4096, 256, 1024)}
# What runs before fusedattn is imported: the package, and enough of it to start its threads.
FIRST = {
    "nothing": "",
    "torch": "import torch; torch.randn(512, 4096).exp().sum().item()\n",
    "sklearn": "import numpy; from sklearn.cluster import KMeans\n"
    "KMeans(8, n_init=1).fit(numpy.random.default_rng(0).standard_normal((4096, 16)))\n",
}
CHILD = "from fusedattn.bench import neighbour; neighbour.measure_pairs({first!r}, {rounds})"
ROW = "{:14} {:17} {:15} {:>13} {:>10} {:>10} {:>7}"
HEAD = "imported first|attention|np.matmul|attention ms|matmul ms|pair ms|ratio".split("|")


def main(json_path: Path | None = None, *, quick: bool = False) -> int:
    """Print the table of all pairs in all surroundings.

    Parameters
    ----------
    json_path : Path, optional
        Where to write the figures as JSON as well.
    quick : bool, default False
        Fewer rounds.

    Returns
    -------
    int
        0 if every pair stays under the target, else 1.
    """
    print(ROW.format(*HEAD))
    rows: list[dict[str, Any]] = []
    for first, prelude in FIRST.items():
        if prelude and not importlib.util.find_spec(first):
            print(f"{first:14} not installed")
            continue
        code = prelude + CHILD.format(first=first, rounds=3 if quick else 9)
        answer = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
        )
        for found in json.loads(answer.stdout):
            print(_line(found), flush=True)
            rows.append(found)
    worst = max(rows, key=lambda r: float(r["ratio"]))
    print(f"\nworst ratio {worst['ratio']:.2f}, target at most {TARGET}")
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(worst["ratio"] > TARGET)


def alternate(
    first: Callable[[], Any], second: Callable[[], Any], *, rounds: int
) -> dict[str, float]:
    """Time two calls alone and in turns.

    Parameters
    ----------
    first, second : callable
        The two.
    rounds : int
        How often each of the three measurements is repeated, interleaved.

    Returns
    -------
    dict of str to float
        Median seconds ``first``, ``second`` and ``pair``, and ``ratio``: the median over the rounds
        of pair / (first + second).
    """
    from fusedattn.bench.timing import interleave

    def pair() -> None:
        first()
        second()

    calls = {"pair": pair, "first": first, "second": second}
    samples = interleave(calls, min_rounds=rounds, max_rounds=rounds, sample=0.1)
    ratios = [p / (a + b) for p, a, b in zip(*samples.values(), strict=True)]
    return {name: median(values) for name, values in samples.items()} | {"ratio": median(ratios)}


def _line(found: dict[str, Any]) -> str:
    milliseconds = [f"{found[name] * 1e3:.3f}" for name in ("first", "second", "pair")]
    mark = "" if found["ratio"] <= TARGET else "  above the target"
    names = (found["after"], found["attention"], found["matmul"])
    return ROW.format(*names, *milliseconds, f"{found['ratio']:.2f}") + mark


def measure_pairs(first: str, rounds: int) -> None:
    """Measure all pairs in this process and print them as JSON, marked as done after ``first``."""
    from fusedattn import attention

    rng = np.random.default_rng(0)
    rows = []
    for shape, (b, h, s, d) in ATTENTION.items():
        q, k, v = (rng.standard_normal((b, h, s, d), dtype=np.float32) for _ in range(3))
        for sizes, (m, inner, n) in PRODUCTS.items():
            x = rng.standard_normal((m, inner), dtype=np.float32)
            y = rng.standard_normal((inner, n), dtype=np.float32)
            found = alternate(
                lambda q=q, k=k, v=v: attention(q, k, v),  # type: ignore[misc]
                lambda x=x, y=y: np.matmul(x, y),  # type: ignore[misc]
                rounds=rounds,
            )
            rows.append({"after": first, "attention": shape, "matmul": sizes, **found})
    json.dump(rows, sys.stdout)

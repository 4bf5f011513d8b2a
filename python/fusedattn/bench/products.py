"""Matrix products of a linear layer, ours, NumPy's and PyTorch's, as shares of the peak."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from fusedattn.bench.timing import Limits, interleave
from fusedattn.nn._core_ops import product

__all__ = ["main"]

TOKENS = 4096
SHAPES = ((256, 256), (256, 1024), (1024, 256), (384, 1536))  # inputs, outputs
ROW = "{:24} {:>6} {:>7} {:>9}"


def main(threads: int, *, quick: bool = False) -> None:
    """Print the table: y = x Wᵀ, dx = dy W and dW = dyᵀ x for each shape.

    Parameters
    ----------
    threads : int
    quick : bool, default False
        Fewer rounds.
    """
    print("\nProducts of float32, share of the multiply-add peak:")
    print(ROW.format(f"{TOKENS} tokens", "ours", "NumPy", "PyTorch"))
    rng = np.random.default_rng(0)
    for inputs, outputs in SHAPES:
        x, dy, w = (
            rng.standard_normal(shape, dtype=np.float32)
            for shape in ((TOKENS, inputs), (TOKENS, outputs), (outputs, inputs))
        )
        for name, a, b in (("x Wᵀ", x, w.T), ("dy W", dy, w), ("dyᵀ x", dy.T, x)):
            calls = _calls(a, b, threads)
            before = Limits.now("float32", threads)
            samples = interleave(
                calls, min_rounds=3 if quick else 7, seconds=0.2 if quick else 0.6, sample=0.03
            )
            peak = before.highest(Limits.now("float32", threads)).flops
            flops = 2.0 * TOKENS * inputs * outputs
            shares = [
                f"{100 * flops / median(samples[n]) / peak:.0f} %" if n in samples else "-"
                for n in ("ours", "numpy", "pytorch")
            ]
            print(ROW.format(f"{name}, {inputs} to {outputs}", *shares), flush=True)


def _calls(a: Any, b: Any, threads: int) -> dict[str, Callable[[], Any]]:
    c = np.empty((a.shape[0], b.shape[1]), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: product(a, b),
        "numpy": lambda: np.matmul(a, b, out=c),
    }
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
        ta, tb = torch.from_numpy(a), torch.from_numpy(b)
        calls["pytorch"] = lambda: ta @ tb
    return calls

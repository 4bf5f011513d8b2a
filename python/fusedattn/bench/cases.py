"""The shapes that are measured, and what each of them costs at least."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CASES", "DTYPES", "Case", "Problem", "numpy_dtype", "select"]

Array = NDArray[Any]

DTYPES = ("float32", "float64", "float16", "bfloat16")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; bfloat16 is `ml_dtypes`'."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ModuleNotFoundError("bfloat16 arrays need ml_dtypes", name="ml_dtypes") from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


@dataclass(frozen=True)
class Case:
    """One attention problem, by its sizes.

    Attributes
    ----------
    name : str
        What ``fusedattn bench --case`` calls it.
    b, h, sq, sk, d : int
        Batch, query heads, query and key lengths, head dimension of Q and K.
    hkv, dv : int, optional
        Key/value heads (default ``h``) and head dimension of V (default ``d``).
    causal : bool
        Whether query i sees the keys j <= i only.
    dtype : str
        Name of the arrays' dtype, one of `DTYPES`.
    """

    name: str
    b: int
    h: int
    sq: int
    sk: int
    d: int
    hkv: int = 0
    dv: int = 0
    causal: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hkv", self.hkv or self.h)
        object.__setattr__(self, "dv", self.dv or self.d)

    @property
    def shape(self) -> str:
        """The sizes in one short line, in the field's own letters."""
        heads = f"H{self.h}" if self.hkv == self.h else f"H{self.h}/{self.hkv}"
        length = f"S{self.sq}" if self.sq == self.sk else f"Sq{self.sq} Sk{self.sk}"
        width = f"D{self.d}" if self.dv == self.d else f"D{self.d}/{self.dv}"
        notes = ["causal"] * self.causal + [self.dtype] * (self.dtype != "float32")
        return " ".join([f"B{self.b}", heads, length, width, *notes])

    @property
    def directions(self) -> tuple[str, ...]:
        """What is worth measuring: a few queries to many keys, decoding, is not differentiated."""
        few = self.sq <= 16 < self.sk
        return ("forward",) if few else ("forward", "backward")

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that may see each other, over all batches and heads."""
        if not self.causal:
            return self.b * self.h * self.sq * self.sk
        full = min(self.sq, self.sk)
        return self.b * self.h * (full * (full + 1) // 2 + (self.sq - full) * self.sk)

    def flops(self, direction: str) -> float:
        """Floating-point operations of the products that ``direction`` cannot do without."""
        forward = self.pairs * (2 * self.d + 2 * self.dv)
        return float(forward) if direction == "forward" else 2.5 * forward

    def bytes(self, direction: str) -> float:
        """Bytes that must cross the memory bus: each input read once, each output written once."""
        q = self.b * self.h * self.sq * (self.d + self.dv)  # Q and O
        kv = self.b * self.hkv * self.sk * (self.d + self.dv)
        arrays = q + kv if direction == "forward" else 2 * (q + kv)  # dO, dQ, dK, dV besides
        return float(arrays * numpy_dtype(self.dtype).itemsize)

    @property
    def score_bytes(self) -> int:
        """Size of one score matrix, which only the unfused computation forms."""
        return self.b * self.h * self.sq * self.sk * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Problem:
    """A case with data: standard normal ``q``, ``k``, ``v`` and ``dout``, layout ``bhsd``."""

    case: Case
    seed: int = 0

    @cached_property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """``(q, k, v, dout)``, drawn once."""
        c = self.case
        rng = np.random.default_rng(self.seed)
        shapes = [
            (c.b, c.h, c.sq, c.d),
            (c.b, c.hkv, c.sk, c.d),
            (c.b, c.hkv, c.sk, c.dv),
            (c.b, c.h, c.sq, c.dv),
        ]
        draw = np.float64 if c.dtype == "float64" else np.float32
        kind = numpy_dtype(c.dtype)
        q, k, v, dout = (
            rng.standard_normal(s, dtype=draw).astype(kind, copy=False) for s in shapes
        )
        return q, k, v, dout


CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case("bert-128", 8, 12, 128, 128, 64),
        Case("bert-512", 8, 12, 512, 512, 64),
        Case("long-d64", 1, 8, 4096, 4096, 64),
        Case("long-d128", 1, 8, 4096, 4096, 128),
        Case("causal-512", 8, 12, 512, 512, 64, causal=True),
        Case("causal-4096", 1, 8, 4096, 4096, 64, causal=True),
        Case("minilm-128", 32, 12, 128, 128, 32),
        Case("one-head", 1, 1, 4096, 4096, 64),
        Case("grouped", 1, 32, 1024, 1024, 128, hkv=8, causal=True),
        Case("odd-197", 8, 12, 197, 197, 64),
        Case("odd-331", 4, 7, 331, 331, 80),
        Case("odd-d96", 4, 7, 331, 331, 96),
        Case("odd-d40", 4, 7, 331, 331, 40),
        Case("bf16-512", 8, 12, 512, 512, 64, dtype="bfloat16"),
        Case("bf16-d64", 1, 8, 4096, 4096, 64, dtype="bfloat16"),
        Case("bf16-d128", 1, 8, 4096, 4096, 128, dtype="bfloat16"),
        Case("f16-512", 8, 12, 512, 512, 64, dtype="float16"),
        Case("f64-512", 8, 12, 512, 512, 64, dtype="float64"),
        Case("decode", 1, 32, 1, 32768, 128),
        Case("decode-bf16", 1, 32, 1, 32768, 128, dtype="bfloat16"),
        Case("decode-gqa", 1, 32, 1, 32768, 128, hkv=8),
        Case("decode-b16", 16, 12, 1, 2048, 64),
        *(Case(f"few-{n}", 1, 32, n, 4096, 128) for n in (2, 4, 8, 16)),
        Case("tiny", 1, 1, 16, 16, 16),
    ]
}


def select(patterns: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Case]:
    """The cases whose name matches one of the patterns, in their own dtype or in other ones.

    Parameters
    ----------
    patterns : sequence of str
        Names, or patterns in the shell's way (``long*``); none means every case.
    dtypes : sequence of str
        None leaves each case its own. Otherwise every shape is measured in each of these, once.

    Returns
    -------
    list of Case

    Raises
    ------
    ValueError
        For a pattern that matches no case.
    """
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise ValueError(f"expected a case or a pattern of {', '.join(CASES)}, got {pattern!r}")
    found = [
        case
        for name, case in CASES.items()
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if dtypes:
        shapes: dict[Case, Case] = {}
        for case in found:
            shapes.setdefault(replace(case, name="", dtype=""), case)
        found = [replace(case, dtype=dtype) for dtype in dtypes for case in shapes.values()]
    return found

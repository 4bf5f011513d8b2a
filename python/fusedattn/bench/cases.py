"""The shapes that are measured, and what each of them costs at least."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CASES", "Case", "Problem"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One attention problem, by its sizes.

    Attributes
    ----------
    name : str
        What ``fusedattn bench --cases`` calls it.
    b, h, sq, sk, d : int
        Batch, query heads, query and key lengths, head dimension of Q and K.
    hkv, dv : int, optional
        Key/value heads (default ``h``) and head dimension of V (default ``d``).
    causal : bool
        Whether query i sees the keys j <= i only.
    dtype : str
        Name of the arrays' dtype.
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
        """What is worth measuring: decoding (one query) is never differentiated."""
        return ("forward",) if self.sq == 1 else ("forward", "backward")

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
        return float(arrays * np.dtype(self.dtype).itemsize)

    @property
    def score_bytes(self) -> int:
        """Size of one score matrix, which only the unfused computation forms."""
        return self.b * self.h * self.sq * self.sk * np.dtype(self.dtype).itemsize


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
        q, k, v, dout = (
            rng.standard_normal(s, dtype=draw).astype(c.dtype, copy=False) for s in shapes
        )
        return q, k, v, dout


CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case("bert-128", 8, 12, 128, 128, 64),
        Case("bert-512", 8, 12, 512, 512, 64),
        Case("minilm-128", 32, 12, 128, 128, 32),
        Case("long-d32", 1, 8, 4096, 4096, 32),
        Case("long-d64", 1, 8, 4096, 4096, 64),
        Case("long-d128", 1, 8, 4096, 4096, 128),
        Case("one-head", 1, 1, 4096, 4096, 64),
        Case("causal-512", 8, 12, 512, 512, 64, causal=True),
        Case("causal-4096", 1, 8, 4096, 4096, 64, causal=True),
        Case("grouped", 1, 32, 1024, 1024, 128, hkv=8, causal=True),
        Case("odd-197", 8, 12, 197, 197, 64),
        Case("float64-512", 8, 12, 512, 512, 64, dtype="float64"),
        Case("decode", 1, 8, 1, 32768, 128),
    ]
}

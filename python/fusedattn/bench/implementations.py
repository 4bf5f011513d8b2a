"""Who computes: fusedattn, plain NumPy, and PyTorch where it is installed.

A contender is prepared for one problem; ``forward()`` and ``backward()`` then do the work that is
timed and nothing else. What a backward pass needs from its forward pass (the log-sum-exp, the
probabilities, the graph) is made before the clock starts, for everyone alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cached_property
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from fusedattn.bench.cases import Array, Case, Problem

__all__ = ["Contender", "contenders", "disagreement"]

NUMPY_BYTES = 4e9
"""NumPy, which forms the score matrix, is left out where it needs more than this."""


class Contender(Protocol):
    """One implementation, prepared for one problem."""

    name: str

    def forward(self) -> Any:
        """Compute and return the output (B, H, Sq, Dv)."""

    def backward(self) -> Any:
        """Compute and return ``(dq, dk, dv)``."""


class FusedAttention:
    """Ours, through the public functions."""

    name = "fusedattn"

    def __init__(self, problem: Problem, threads: int) -> None:
        self.q, self.k, self.v, self.dout = problem.arrays
        self.rules: dict[str, Any] = {"is_causal": problem.case.causal, "num_threads": threads}

    @cached_property
    def _saved(self) -> tuple[Array, Array]:
        from fusedattn import attention

        out, lse = attention(self.q, self.k, self.v, return_lse=True, **self.rules)
        return out, lse

    def forward(self) -> Any:
        """``attention`` with its defaults."""
        from fusedattn import attention

        return attention(self.q, self.k, self.v, **self.rules)

    def backward(self) -> Any:
        """``attention_backward`` from the saved output and log-sum-exp."""
        from fusedattn import attention_backward

        return attention_backward(self.dout, self.q, self.k, self.v, *self._saved, **self.rules)[:3]


class NumPy:
    """Attention as one writes it in NumPy: two matrix products around a softmax."""

    name = "numpy"

    def __init__(self, problem: Problem) -> None:
        c = problem.case
        q, k, v, dout = problem.arrays
        # Query heads that share a key head get an axis of their own, so that products broadcast.
        self.q = q.reshape(c.b, c.hkv, -1, c.sq, c.d)
        self.dout = dout.reshape(c.b, c.hkv, -1, c.sq, c.dv)
        self.k, self.v = k[:, :, None], v[:, :, None]
        self.shape = (c.b, c.h, c.sq)
        self.scale = q.dtype.type(c.d**-0.5)
        self.hidden = ~np.tri(c.sq, c.sk, dtype=bool) if c.causal else None

    def _probabilities(self) -> Array:
        scores: Array = np.matmul(self.q * self.scale, self.k.swapaxes(-1, -2))
        if self.hidden is not None:
            np.copyto(scores, -np.inf, where=self.hidden)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores

    @cached_property
    def _saved(self) -> Array:
        return self._probabilities()

    def forward(self) -> Any:
        """The softmax's probabilities times the values."""
        return np.matmul(self._probabilities(), self.v).reshape(*self.shape, -1)

    def backward(self) -> Any:
        """The chain rule through the saved probabilities."""
        p = self._saved
        dv = np.matmul(p.swapaxes(-1, -2), self.dout).sum(axis=2)
        ds = np.matmul(self.dout, self.v.swapaxes(-1, -2))
        ds -= np.einsum("...ij,...ij->...i", ds, p)[..., None]
        ds *= p
        ds *= self.scale
        dq = np.matmul(ds, self.k).reshape(*self.shape, -1)
        dk = np.matmul(ds.swapaxes(-1, -2), self.q).sum(axis=2)
        return dq, dk, dv


class PyTorch:
    """``torch.nn.functional.scaled_dot_product_attention``, without and with autograd."""

    name = "pytorch"

    def __init__(self, problem: Problem, threads: int, layout: str, repeat: bool) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        self.causal = problem.case.causal
        self.groups = problem.case.h // problem.case.hkv
        self.repeat = repeat
        tensors = [torch.from_numpy(x) for x in problem.arrays]
        if layout == "bshd":  # heads innermost in memory, the same shape to the eye
            tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        *self.inputs, self.dout = tensors

    def _compute(self, q: Any, k: Any, v: Any) -> Any:
        if self.repeat:
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        return self.torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.groups > 1 and not self.repeat
        )

    @cached_property
    def _saved(self) -> tuple[Any, list[Any]]:
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        return self._compute(*leaves), leaves

    def forward(self) -> Any:
        """Without recording a graph."""
        with self.torch.no_grad():
            return self._compute(*self.inputs)

    def backward(self) -> Any:
        """Through the graph of a forward pass done before."""
        out, leaves = self._saved
        return self.torch.autograd.grad(out, leaves, self.dout, retain_graph=True)


def contenders(problem: Problem, direction: str, threads: int) -> list[Contender]:
    """Everyone who can compute ``problem`` here, fusedattn first.

    Parameters
    ----------
    problem : Problem
        The case and its data.
    direction : {"forward", "backward"}
        What will be timed.
    threads : int
        Threads for fusedattn and PyTorch; NumPy's are its BLAS's own.

    Returns
    -------
    list of Contender
        NumPy is left out where its score matrices would need more than 4 GB, PyTorch where it is
        not installed. PyTorch comes in the memory layout, and with the way of grouping heads, that
        serve it best here.
    """
    case = problem.case
    found: list[Contender] = [FusedAttention(problem, threads)]
    if case.score_bytes * (2 if direction == "forward" else 4) <= NUMPY_BYTES:
        found.append(NumPy(problem))
    if importlib.util.find_spec("torch"):
        found.append(_fastest(_pytorch_variants(problem, threads), direction))
    return found


def _pytorch_variants(problem: Problem, threads: int) -> Iterator[Contender]:
    case = problem.case
    for layout in ("bhsd", "bshd"):
        for repeat in (False, True) if case.hkv < case.h else (False,):
            yield PyTorch(problem, threads, layout, repeat)


def _fastest(variants: Iterator[Contender], direction: str) -> Contender:
    """The variant with the shortest of three calls after a warming one."""

    def seconds(variant: Contender) -> float:
        call: Callable[[], Any] = getattr(variant, direction)
        call()
        times = []
        for _ in range(3):
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        return min(times)

    return min(variants, key=seconds)


def disagreement(case: Case, direction: str, ours: Contender, other: Contender) -> float:
    """Largest difference of two contenders' answers, in units that a correct pair keeps near one.

    Parameters
    ----------
    case : Case
        What both were prepared for.
    direction : {"forward", "backward"}
        Which answer to compare.
    ours, other : Contender
        The two.

    Returns
    -------
    float
        Over all arrays of the answer, the largest absolute difference divided by
        ``eps * sqrt(n) * max(abs(array))``: rounding errors of a sum of n products grow like
        sqrt(n), where n is the longer of the two lengths plus the head dimension.
    """
    n = max(case.sq, case.sk) + max(case.d, case.dv)
    worst = 0.0
    answers = (getattr(contender, direction)() for contender in (ours, other))
    mine, theirs = ([a] if direction == "forward" else a for a in answers)
    for a, b in zip(mine, theirs, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape:
            raise ValueError(f"{ours.name} answered with {a.shape}, {other.name} with {b.shape}")
        unit = np.finfo(a.dtype).eps * n**0.5 * np.abs(b).max()
        worst = max(worst, float(np.abs(a - b).max() / unit))
    return worst

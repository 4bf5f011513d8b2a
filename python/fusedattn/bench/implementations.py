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

from fusedattn.bench.cases import Array, Case, Problem, numpy_dtype

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
    """Attention as one writes it in NumPy: two matrix products around a softmax.

    NumPy has no fast product of 16-bit types, so what one writes there widens the input to float32
    and rounds the result; both are timed.
    """

    name = "numpy"

    def __init__(self, problem: Problem) -> None:
        c = problem.case
        q, k, v, dout = problem.arrays
        # Query heads that share a key head get an axis of their own, so that products broadcast.
        self.q = q.reshape(c.b, c.hkv, -1, c.sq, c.d)
        self.dout = dout.reshape(c.b, c.hkv, -1, c.sq, c.dv)
        self.k, self.v = k[:, :, None], v[:, :, None]
        self.shape = (c.b, c.h, c.sq)
        self.dtype = q.dtype
        self.real = np.dtype(np.float64 if q.dtype == np.float64 else np.float32)
        self.scale = self.real.type(c.d**-0.5)
        self.hidden = ~np.tri(c.sq, c.sk, dtype=bool) if c.causal else None

    def _wide(self, x: Array) -> Array:
        return x.astype(self.real, copy=False)

    def _narrow(self, x: Array) -> Array:
        return x.astype(self.dtype, copy=False)

    def _probabilities(self) -> Array:
        q, k = self._wide(self.q), self._wide(self.k)
        scores: Array = np.matmul(q * self.scale, k.swapaxes(-1, -2))
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
        out = np.matmul(self._probabilities(), self._wide(self.v))
        return self._narrow(out.reshape(*self.shape, -1))

    def backward(self) -> Any:
        """The chain rule through the saved probabilities."""
        p = self._saved
        q, k, v, dout = (self._wide(x) for x in (self.q, self.k, self.v, self.dout))
        dv = np.matmul(p.swapaxes(-1, -2), dout).sum(axis=2)
        ds = np.matmul(dout, v.swapaxes(-1, -2))
        ds -= np.einsum("...ij,...ij->...i", ds, p)[..., None]
        ds *= p
        ds *= self.scale
        dq = np.matmul(ds, k).reshape(*self.shape, -1)
        dk = np.matmul(ds.swapaxes(-1, -2), q).sum(axis=2)
        return tuple(self._narrow(x) for x in (dq, dk, dv))


class PyTorch:
    """``torch.nn.functional.scaled_dot_product_attention``, without and with autograd.

    ``grouping`` says how heads share keys: ``"native"`` by ``enable_gqa``, ``"repeat"`` by
    repeating the keys in memory, ``"fold"`` by counting a group's heads as further queries,
    which only attention without a causal mask allows.
    """

    name = "pytorch"

    def __init__(self, problem: Problem, threads: int, layout: str, grouping: str) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        self.causal = problem.case.causal
        self.groups = problem.case.h // problem.case.hkv
        self.grouping = grouping
        tensors = [self._tensor(x) for x in problem.arrays]
        if layout == "bshd":  # heads innermost in memory, the same shape to the eye
            tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        *self.inputs, self.dout = tensors

    def _tensor(self, x: Array) -> Any:
        if x.dtype == np.float32 or x.dtype == np.float64 or x.dtype == np.float16:
            return self.torch.from_numpy(x)
        return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)

    def _compute(self, q: Any, k: Any, v: Any) -> Any:
        shape = q.shape[:-1]
        if self.grouping == "repeat":
            k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        elif self.grouping == "fold":
            q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        native = self.groups > 1 and self.grouping == "native"
        out = self.torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=native
        )
        return out.reshape(*shape, -1)

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
    groupings = ["native"]
    if case.hkv < case.h:
        groupings += ["repeat"] if case.causal else ["repeat", "fold"]
    for layout in ("bhsd", "bshd"):
        for grouping in groupings:
            yield PyTorch(problem, threads, layout, grouping)


def _fastest(variants: Iterator[Contender], direction: str) -> Contender:
    """The variant with the shortest of a few calls after a warming one; long calls run once."""

    def seconds(variant: Contender) -> float:
        call: Callable[[], Any] = getattr(variant, direction)
        call()
        times: list[float] = []
        while len(times) < 3 and sum(times) < 1:
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
    eps = _eps(case.dtype)
    for a, b in zip(mine, theirs, strict=True):
        a, b = _float64(a), _float64(b)
        if a.shape != b.shape:
            raise ValueError(f"{ours.name} answered with {a.shape}, {other.name} with {b.shape}")
        unit = eps * n**0.5 * np.abs(b).max()
        worst = max(worst, float(np.abs(a - b).max() / unit))
    return worst


def _float64(x: Any) -> Array:
    """An array or a tensor of any dtype as float64, which holds every one of them exactly."""
    return (x if isinstance(x, np.ndarray) else x.double().numpy()).astype(np.float64)


def _eps(dtype: str) -> float:
    if dtype == "bfloat16":  # NumPy's finfo does not know it
        return 2.0**-7
    return float(np.finfo(numpy_dtype(dtype)).eps)

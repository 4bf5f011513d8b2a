"""How wrong a kernel may be: the error that its precision costs anybody, and a small floor.

A result is compared with the oracle of higher precision. So is a careful unfused computation of
the same precision: the whole score matrix, a softmax with the maximum subtracted, NumPy's matrix
products. The kernel's largest error may be FORWARD (for gradients GRADIENT) times that of the
unfused one, which can be nearly 0 by luck where there are few numbers; hence a floor of FLOOR
times the error that independent roundings of all products and logits would add up to
(`rounding`). Tests with many numbers ask for a lower floor.

For a 16-bit type the careful computation widens the input to float32, computes there, and rounds
each result once to the type; the floor stays float32's. All gradients, the oracle's too, start from
the rounded output, as `attention_backward` must, which is given no other: delta = rowsum(dout *
out) inherits that rounding. ``saved=False`` asks for the harder bound, of gradients without it.

Where the instruction set multiplies bfloat16 as it is, so does the careful computation: P and dS
are rounded as they enter a product, and their roundings join the floor (`operand_rounding`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

import fusedattn
from fusedattn.reference import Rules, backward, forward
from tests.yardstick import (
    Problem,
    compute_type,
    dtype_of,
    once,
    operand_rounding,
    rounding,
    unfused,
)

FORWARD, GRADIENT, FLOOR = 2.0, 3.0, 4.0


def fused(p: Problem, need: Sequence[str] | None = None, **options: Any) -> dict[str, np.ndarray]:
    """Results of the kernel under test, forward and the gradients in ``need``, by default all."""
    if need is None:
        need = ("q", "k", "v", *(name for name in ("bias", "sinks") if name in p.rules))
    options = p.options | options
    out, lse = fusedattn.attention(p.q, p.k, p.v, return_lse=True, **options)
    results = {"out": out, "lse": lse}
    if need:
        grads = fusedattn.attention_backward(
            p.dout, p.q, p.k, p.v, out, lse, dlse=p.dlse, need=need, **options
        )
        results |= {name: x for name, x in grads._asdict().items() if x is not None}
    return results


@once
def oracle(p: Problem, saved: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All results, in the problem's layout; for float64, the oracle's formula in long double.

    ``saved``: the output that gradients start from, in the problem's layout; by default the exact.
    """
    real = np.longdouble if p.q.dtype == np.float64 else np.float64
    q, k, v, dout = (p.heads_first(x.astype(real)) for x in (p.q, p.k, p.v, p.dout))
    out, lse = forward(q, k, v, Rules(**p.rules))
    dlse = np.zeros(lse.shape, real) if p.dlse is None else p.dlse.reshape(lse.shape)
    kept = out if saved is None else p.heads_first(saved.astype(real))
    dq, dk, dv, dbias, dsinks = backward(dout, q, k, v, kept, lse, dlse, Rules(**p.rules))
    results = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    results = {n: p.heads_first(x) if p.q.ndim > 2 else x[0] for n, x in results.items()}
    results["lse"] = lse if p.q.ndim > 2 else lse[0]
    others = {"dbias": dbias, "dsinks": dsinks}
    return results | {name: x for name, x in others.items() if x is not None}


def in_pairs(p: Problem) -> bool:
    """Is bfloat16 multiplied as it is, so that P and dS are rounded before their products?"""
    return p.q.dtype.name == "bfloat16" and fusedattn.cpu_info()["isa"] in ("avx512bf16", "amx")


def assert_same(got: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    """Equal, NaN to NaN, which NumPy asserts of its own types only: so 16-bit ones are widened."""
    assert got.dtype == expected.dtype, name
    if got.dtype.itemsize == 2:
        got, expected = got.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_array_equal(got, expected, err_msg=name)


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def error(got: np.ndarray, exact: np.ndarray, name: str) -> float:
    """Largest error; the exact values decide where an infinity or a NaN must be."""
    if got.dtype.itemsize == 2:
        got = got.astype(np.float32)  # exact
    odd = ~np.isfinite(exact)
    np.testing.assert_array_equal(got[odd], exact[odd], err_msg=name)
    assert np.all(np.isfinite(got[~odd])), f"{name}: not finite where the oracle is"
    return largest(got[~odd] - exact[~odd])


def assert_accurate(
    got: dict[str, np.ndarray], p: Problem, floor: float = FLOOR, saved: bool = True
) -> None:
    """Compare results, in the problem's layout, with what is allowed; ``saved``: see the top."""
    out = got["out"] if saved and p.q.dtype.itemsize == 2 else None
    low = in_pairs(p)
    exact, careful, natural = oracle(p, out), unfused(p, out, low), rounding(p)
    operands = operand_rounding(p) if low else {}
    real = compute_type(p.q.dtype)
    eps, tiny = np.finfo(real).eps, np.finfo(real).tiny
    for name, result in got.items():
        assert result.shape == exact[name].shape, name
        assert result.dtype == dtype_of(name, p), name
        factor = FORWARD if name in ("out", "lse") else GRADIENT
        place = p.heads_first if name in ("out", "dq", "dk", "dv") else np.asarray
        best = error(careful[name].reshape(place(exact[name]).shape), place(exact[name]), name)
        allowed = factor * best + floor * (eps * natural[name] + operands.get(name, 0.0)) + tiny
        wrong = error(result, exact[name], name)
        assert wrong <= allowed, f"{name}: error {wrong:.3g}, allowed {allowed:.3g}"

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

import functools
import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

import fusedattn
from fusedattn.reference._formula import (
    Rules,
    _group,
    _kept,
    _logits,
    _per_sample,
    _reduce_to,
    _sum_group,
    _t,
    backward,
    forward,
)

FORWARD, GRADIENT, FLOOR = 2.0, 3.0, 4.0


@dataclass
class Problem:
    """One call: arrays in ``layout``, and the rules as keyword arguments."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    rules: dict[str, Any] = field(default_factory=dict)
    layout: str = "bhsd"
    dlse: np.ndarray | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {**self.rules, "layout": self.layout}

    def heads_first(self, x: np.ndarray) -> np.ndarray:
        """x, in the problem's layout, as (..., H, S, D)."""
        if x.ndim == 2:
            return x[None]
        return x.swapaxes(-2, -3) if self.layout == "bshd" else x


def compute_type(dtype: Any) -> Any:
    """The type that sums are kept in, and the LSE's: float32 for everything but float64."""
    return np.float64 if dtype == np.float64 else np.float32


def dtype_of(name: str, p: Problem) -> Any:
    """That of a result: the gradient of the sinks is of theirs."""
    if name == "dsinks":
        return p.rules["sinks"].dtype
    return compute_type(p.q.dtype) if name == "lse" else p.q.dtype


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


Answer = TypeVar("Answer")


def once(compute: Callable[..., Answer]) -> Callable[..., Answer]:
    """Compute each problem's answer once for all instruction sets, which take turns with it."""
    known: dict[bytes, Answer] = {}

    @functools.wraps(compute)
    def remembered(p: Problem, *others: Any) -> Answer:
        key = hashlib.blake2b(pickle.dumps((p, others))).digest()
        if key not in known:
            if len(known) >= 500:
                known.clear()
            known[key] = compute(p, *others)
        return known[key]

    return remembered


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


@dataclass
class Scores:
    """What `unfused` and `rounding` share: the logits by their parts, and the weights they give.

    ``bent`` is tanh(logit / softcap), ``slope`` its derivative, ``kept`` dropout's factors; numbers
    where there is no such rule. ``sink`` is the weight of the sinks, (..., H, Sq).
    """

    s: np.ndarray
    alibi: Any
    bent: Any
    slope: Any
    kept: Any
    p: np.ndarray
    sink: np.ndarray
    lse: np.ndarray
    scale: Any
    group: int


def scores(p: Problem, q: np.ndarray, k: np.ndarray) -> Scores:
    """In the dtype of q; heads first, keys not yet repeated."""
    rules, group, real = Rules(**p.rules), _group(q, k), q.dtype.type
    batch, heads = q.shape[:-3], q.shape[-3]
    k = np.repeat(k, group, axis=-3)
    allowed = _logits(q.astype(np.float64), k.astype(np.float64), rules)[1]
    scale = real(q.shape[-1] ** -0.5 if rules.scale is None else rules.scale)
    s = (q * scale) @ _t(k)
    bent, slope, alibi = real(0), real(1), real(0)
    if rules.softcap:
        bent = np.tanh(s / real(rules.softcap))
        s, slope = real(rules.softcap) * bent, (1 - bent) * (1 + bent)
    if rules.alibi_slopes is not None:
        slopes = np.asarray(rules.alibi_slopes, real)
        slopes = slopes if slopes.ndim == 1 else slopes.reshape(*batch, heads)
        positions = np.arange(q.shape[-2])[:, None] + _per_sample(rules.q_offset, batch)
        alibi = slopes[..., None, None] * abs(positions - np.arange(k.shape[-2])).astype(real)
        s = s - alibi
    if rules.bias is not None:
        s = s + np.asarray(rules.bias, real)
    s = np.where(allowed, s, real(-np.inf))
    sinks = np.full(heads, -np.inf, real) if rules.sinks is None else np.asarray(rules.sinks, real)
    sinks = np.where(allowed.any(axis=-1), sinks[:, None], real(-np.inf))[..., None]
    top = np.maximum(s.max(axis=-1, initial=-np.inf, keepdims=True), sinks)
    top = np.where(np.isneginf(top), real(0), top)
    weights, sink = np.exp(s - top), np.exp(sinks - top)
    total = weights.sum(axis=-1, keepdims=True) + sink
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    total = np.where(total > 0, total, real(1))
    kept = np.asarray(_kept(s.shape, rules)).astype(real)
    return Scores(
        s,
        alibi,
        bent,
        slope,
        kept,
        weights / total,
        (sink / total)[..., 0],
        lse[..., 0],
        scale,
        group,
    )


def in_pairs(p: Problem) -> bool:
    """Is bfloat16 multiplied as it is, so that P and dS are rounded before their products?"""
    return p.q.dtype.name == "bfloat16" and fusedattn.cpu_info()["isa"] in ("avx512bf16", "amx")


@once
def unfused(
    p: Problem, saved: np.ndarray | None = None, low: bool = False
) -> dict[str, np.ndarray]:
    """All results, heads first, by the textbook and in the precision of the input.

    ``saved``: the output that gradients start from, in the problem's layout; by default its own.
    ``low``: round P and dS as they enter a product.
    """

    def operand(x: np.ndarray) -> np.ndarray:
        return x.astype(p.q.dtype).astype(x.dtype) if low else x

    real = compute_type(p.q.dtype)
    q, k, v, dout = (p.heads_first(np.asarray(x, real)) for x in (p.q, p.k, p.v, p.dout))
    x = scores(p, q, k)
    hkv, k, v = k.shape[-3], np.repeat(k, x.group, axis=-3), np.repeat(v, x.group, axis=-3)
    weights = operand(x.p) * x.kept
    out = weights @ v
    kept = out if saved is None else p.heads_first(saved.astype(real))
    delta = (dout * kept).sum(axis=-1, keepdims=True)
    if p.dlse is not None:
        delta = delta - p.dlse.reshape(delta.shape)
    ds = x.p * (x.kept * (dout @ _t(v)) - delta)
    bent = operand(x.scale * (ds * x.slope))
    results = {"out": out, "lse": x.lse, "dq": bent @ k}
    results["dk"] = _sum_group(_t(bent) @ q, hkv, x.group)
    results["dv"] = _sum_group(_t(weights) @ dout, hkv, x.group)
    if "bias" in p.rules:
        results["dbias"] = _reduce_to(ds, np.shape(p.rules["bias"]))
    if "sinks" in p.rules:
        results["dsinks"] = _reduce_to(-x.sink * delta[..., 0], (x.p.shape[-3], 1))[:, 0]
    return {name: x.astype(dtype_of(name, p)) for name, x in results.items()}


@once
def rounding(p: Problem) -> dict[str, float]:
    """Size of each result's error, in eps, if every product, logit and sum is rounded by chance.

    Names that end in 2 hold squares: of terms, added where the formula adds terms, so that errors
    add as independent ones do, and of the sum. A logit's rounding is relative in its weight.
    """
    arrays = (np.asarray(x, np.float64) for x in (p.q, p.k, p.v, p.dout))
    q, k, v, dout = (p.heads_first(x) for x in arrays)
    x = scores(p, q, k)
    k, v = np.repeat(k, x.group, axis=-3), np.repeat(v, x.group, axis=-3)
    bias = np.asarray(p.rules.get("bias", 0.0), np.float64)
    bias = np.where(np.isfinite(bias), bias, 0.0)
    sinks = np.asarray(p.rules.get("sinks", 0.0), np.float64)
    sinks = np.where(np.isfinite(sinks), sinks, 0.0)

    def product2(a2: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(a2 @ b**2 + (a @ b) ** 2)

    # Softcap bends the product's error too; the distance, times the slope, is rounded like a bias.
    raw2 = x.scale**2 * product2(q**2, q, _t(k))
    cap = p.rules.get("softcap", 0.0)
    s2 = x.slope**2 * raw2 + (cap * x.bent) ** 2 + x.alibi**2 + bias**2
    s2 = np.where(x.p > 0, s2, 0.0)
    weight2 = x.p**2 * (1 + s2)
    lse2 = 1 + s2.max(axis=-1, initial=0, keepdims=True) + sinks.reshape(-1, 1, 1) ** 2
    lse2 += np.where(np.isfinite(x.lse), x.lse, 0.0)[..., None] ** 2
    weights, dp = x.p * x.kept, x.kept * (dout @ _t(v))
    out, out2 = weights @ v, product2(weight2 * x.kept**2, weights, v)
    delta = (dout * out).sum(axis=-1, keepdims=True)
    delta2 = (dout**2 * (out**2 + out2)).sum(axis=-1, keepdims=True) + delta**2
    if p.dlse is not None:
        dlse = p.dlse.reshape(delta.shape)
        delta, delta2 = delta - dlse, delta2 + dlse**2
    ds = x.p * (dp - delta)
    ds2 = x.p**2 * (x.kept**2 * product2(dout**2, dout, _t(v)) + delta2)
    ds2 = ds2 + weight2 * (dp - delta) ** 2
    # d tanh = 1 - tanh^2, of a tanh that is rounded and of an argument that was.
    slope2 = (2 * x.bent) ** 2 * (x.bent**2 + x.slope**2 * raw2 / (cap or 1.0) ** 2) + x.slope**2
    bent, bent2 = ds * x.slope, ds2 * x.slope**2 + ds**2 * slope2
    squares = {
        "out": out2,
        "lse": lse2,
        # The errors of delta and of the LSE are the same for all keys: they add before squaring.
        "dq": x.scale**2
        * (product2(bent2, bent, k) + delta2 * ((x.p * x.slope) @ k) ** 2 + lse2 * (bent @ k) ** 2),
        "dk": x.scale**2 * x.group * product2(_t(bent2), _t(bent), q),
        "dv": x.group * product2(_t(weight2 * x.kept**2), _t(weights), dout),
    }
    if "bias" in p.rules:
        # So they do here, over the keys along which the bias was broadcast.
        keys = (*x.p.shape[:-1], *bias.shape[-1:])
        row2 = delta2 * _reduce_to(x.p, keys) ** 2 + lse2 * _reduce_to(ds, keys) ** 2
        squares["dbias"] = _reduce_to(ds2, bias.shape) + _reduce_to(ds, bias.shape) ** 2
        squares["dbias"] = squares["dbias"] + _reduce_to(row2, bias.shape)
    if "sinks" in p.rules:
        terms2 = x.sink[..., None] ** 2 * (delta2 + delta**2 * (1 + lse2))
        total2 = _reduce_to(x.sink[..., None] * delta, (x.p.shape[-3], 1, 1)) ** 2
        squares["dsinks"] = _reduce_to(terms2, (x.p.shape[-3], 1, 1)) + total2
    return {name: float(np.sqrt(np.max(a, initial=0.0))) for name, a in squares.items()}


@once
def operand_rounding(p: Problem) -> dict[str, float]:
    """Largest standard deviation of each result from rounding P and dS to bfloat16 by chance."""
    arrays = (np.asarray(x, np.float64) for x in (p.q, p.k, p.v, p.dout))
    q, k, v, dout = (p.heads_first(x) for x in arrays)
    x = scores(p, q, k)
    k, v = np.repeat(k, x.group, axis=-3), np.repeat(v, x.group, axis=-3)
    weights = x.p * x.kept
    delta = (dout * (weights @ v)).sum(axis=-1, keepdims=True)
    if p.dlse is not None:
        delta = delta - p.dlse.reshape(delta.shape)
    ds2 = (x.scale * x.slope * x.p * (x.kept * (dout @ _t(v)) - delta)) ** 2
    squares = {"out": weights**2 @ v**2, "dq": ds2 @ k**2}
    squares["dk"] = x.group * (_t(ds2) @ q**2)
    squares["dv"] = x.group * (_t(weights**2) @ dout**2)
    unit = 2.0**-9 / np.sqrt(3)  # uniform up to half a unit of the last place
    return {name: unit * float(np.sqrt(np.max(a, initial=0.0))) for name, a in squares.items()}


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

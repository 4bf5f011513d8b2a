"""What a precision costs anybody: a careful unfused computation, and the size of its roundings.

Textbook attention on whole score matrices, which `tests.accuracy` sets a kernel's errors beside. It
is written for itself: of the oracle it shares nothing but which weights dropout keeps, so that a
mistake in one is not hidden by the same in the other.
"""

import functools
import hashlib
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from fusedattn.reference import dropout_mask


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


def turned(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2)


def summed_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sum over what an array of that shape was repeated along to become x."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    repeated = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return np.asarray(x.sum(axis=repeated, keepdims=True))


def summed_to_keys(x: np.ndarray, group: int) -> np.ndarray:
    """(..., H, S, D) to (..., Hkv, S, D): heads next to each other share a key head."""
    *batch, heads, rows, cols = x.shape
    return np.asarray(x.reshape(*batch, heads // group, group, rows, cols).sum(axis=-3))


def each_sample(x: Any, batch: tuple[int, ...]) -> Any:
    """A number, or one for each sample, against (..., H, Sq, Sk)."""
    return x if np.ndim(x) == 0 else np.reshape(x, (*batch, 1, 1, 1))


def allowed_pairs(p: Problem, shape: tuple[int, ...]) -> np.ndarray:
    """Which keys each query may see, (..., H, Sq, Sk)."""
    batch, given = shape[:-3], {name: x for name, x in p.rules.items() if x is not None}
    i, j = np.arange(shape[-2])[:, None], np.arange(shape[-1])
    position = i + each_sample(given.get("q_offset", 0), batch)
    left, right = given.get("window", (-1, -1))
    rules = [
        given.get("mask", True),
        ~np.isneginf(given.get("bias", 0.0)),
        not given.get("is_causal") or j <= position,
        left < 0 or j >= position - left,
        right < 0 or j <= position + right,
        i < each_sample(given.get("q_lengths", shape[-2]), batch),
        j < each_sample(given.get("kv_lengths", shape[-1]), batch),
    ]
    if "segment_ids" in given:
        ids = given["segment_ids"]
        own, others = ids if isinstance(ids, tuple) else (ids, ids)
        own = np.reshape(own, (*batch, 1, shape[-2], 1))
        rules.append(own == np.reshape(others, (*batch, 1, 1, shape[-1])))
    allowed = np.ones(shape, bool)
    for rule in rules:
        allowed &= rule
    return allowed


def kept_weights(p: Problem, shape: tuple[int, ...]) -> Any:
    """What dropout multiplies the weights (..., H, Sq, Sk) by."""
    dropped = round(p.rules.get("dropout_p", 0.0) * 2**16) / 2**16
    if not dropped:
        return 1.0
    samples = (math.prod(shape[:-3]), *shape[-3:])
    first = p.rules.get("first_sample", 0)
    kept = dropout_mask(p.rules["seed"], dropped, samples, first=first).reshape(shape)
    return kept / (1 - dropped) if dropped < 1 else 1.0 * kept


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
    rules, real = p.rules, q.dtype.type
    batch, heads = q.shape[:-3], q.shape[-3]
    group = heads // max(k.shape[-3], 1)
    k = np.repeat(k, group, axis=-3)
    scale = rules.get("scale")
    scale = real(max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    s = (q * scale) @ turned(k)
    bent, slope, alibi = real(0), real(1), real(0)
    if rules.get("softcap"):
        bent = np.tanh(s / real(rules["softcap"]))
        s, slope = real(rules["softcap"]) * bent, (1 - bent) * (1 + bent)
    if rules.get("alibi_slopes") is not None:
        slopes = np.asarray(rules["alibi_slopes"], real)
        slopes = slopes if slopes.ndim == 1 else slopes.reshape(*batch, heads)
        positions = np.arange(q.shape[-2])[:, None] + each_sample(rules.get("q_offset", 0), batch)
        alibi = slopes[..., None, None] * abs(positions - np.arange(k.shape[-2])).astype(real)
        s = s - alibi
    if rules.get("bias") is not None:
        s = s + np.asarray(rules["bias"], real)
    allowed = allowed_pairs(p, s.shape)
    s = np.where(allowed, s, real(-np.inf))
    sinks = rules.get("sinks")
    sinks = np.full(heads, -np.inf, real) if sinks is None else np.asarray(sinks, real)
    sinks = np.where(allowed.any(axis=-1), sinks[:, None], real(-np.inf))[..., None]
    top = np.maximum(s.max(axis=-1, initial=-np.inf, keepdims=True), sinks)
    top = np.where(np.isneginf(top), real(0), top)
    weights, sink = np.exp(s - top), np.exp(sinks - top)
    total = weights.sum(axis=-1, keepdims=True) + sink
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    total = np.where(total > 0, total, real(1))
    kept = np.asarray(kept_weights(p, s.shape)).astype(real)
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
    k, v = np.repeat(k, x.group, axis=-3), np.repeat(v, x.group, axis=-3)
    weights = operand(x.p) * x.kept
    out = weights @ v
    kept = out if saved is None else p.heads_first(saved.astype(real))
    delta = (dout * kept).sum(axis=-1, keepdims=True)
    if p.dlse is not None:
        delta = delta - p.dlse.reshape(delta.shape)
    ds = x.p * (x.kept * (dout @ turned(v)) - delta)
    bent = operand(x.scale * (ds * x.slope))
    results = {"out": out, "lse": x.lse, "dq": bent @ k}
    results["dk"] = summed_to_keys(turned(bent) @ q, x.group)
    results["dv"] = summed_to_keys(turned(weights) @ dout, x.group)
    if "bias" in p.rules:
        results["dbias"] = summed_to(ds, np.shape(p.rules["bias"]))
    if "sinks" in p.rules:
        results["dsinks"] = summed_to(-x.sink * delta[..., 0], (x.p.shape[-3], 1))[:, 0]
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
    raw2 = x.scale**2 * product2(q**2, q, turned(k))
    cap = p.rules.get("softcap", 0.0)
    s2 = x.slope**2 * raw2 + (cap * x.bent) ** 2 + x.alibi**2 + bias**2
    s2 = np.where(x.p > 0, s2, 0.0)
    weight2 = x.p**2 * (1 + s2)
    lse2 = 1 + s2.max(axis=-1, initial=0, keepdims=True) + sinks.reshape(-1, 1, 1) ** 2
    lse2 += np.where(np.isfinite(x.lse), x.lse, 0.0)[..., None] ** 2
    weights, dp = x.p * x.kept, x.kept * (dout @ turned(v))
    out, out2 = weights @ v, product2(weight2 * x.kept**2, weights, v)
    delta = (dout * out).sum(axis=-1, keepdims=True)
    delta2 = (dout**2 * (out**2 + out2)).sum(axis=-1, keepdims=True) + delta**2
    if p.dlse is not None:
        dlse = p.dlse.reshape(delta.shape)
        delta, delta2 = delta - dlse, delta2 + dlse**2
    ds = x.p * (dp - delta)
    ds2 = x.p**2 * (x.kept**2 * product2(dout**2, dout, turned(v)) + delta2)
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
        "dk": x.scale**2 * x.group * product2(turned(bent2), turned(bent), q),
        "dv": x.group * product2(turned(weight2 * x.kept**2), turned(weights), dout),
    }
    if "bias" in p.rules:
        # So they do here, over the keys along which the bias was broadcast.
        keys = (*x.p.shape[:-1], *bias.shape[-1:])
        row2 = delta2 * summed_to(x.p, keys) ** 2 + lse2 * summed_to(ds, keys) ** 2
        squares["dbias"] = summed_to(ds2, bias.shape) + summed_to(ds, bias.shape) ** 2
        squares["dbias"] = squares["dbias"] + summed_to(row2, bias.shape)
    if "sinks" in p.rules:
        terms2 = x.sink[..., None] ** 2 * (delta2 + delta**2 * (1 + lse2))
        total2 = summed_to(x.sink[..., None] * delta, (x.p.shape[-3], 1, 1)) ** 2
        squares["dsinks"] = summed_to(terms2, (x.p.shape[-3], 1, 1)) + total2
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
    ds2 = (x.scale * x.slope * x.p * (x.kept * (dout @ turned(v)) - delta)) ** 2
    squares = {"out": weights**2 @ v**2, "dq": ds2 @ k**2}
    squares["dk"] = x.group * (turned(ds2) @ q**2)
    squares["dv"] = x.group * (turned(weights**2) @ dout**2)
    unit = 2.0**-9 / np.sqrt(3)  # uniform up to half a unit of the last place
    return {name: unit * float(np.sqrt(np.max(a, initial=0.0))) for name, a in squares.items()}

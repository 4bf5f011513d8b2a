"""The formula and its derivative: numbered forward steps, and backward quoting them in reverse.

Arrays are float64 with heads first, (..., H, S, D). Masked pairs are selected away, never
multiplied by 0, since 0 * NaN is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedattn.reference._dropout import dropout_mask, rounded

Array = NDArray[Any]


@dataclass(frozen=True)
class Rules:
    """What decides the logits of a pair (query i, key j), besides q and k.

    B below is the shape of all dimensions before the head and sequence ones, or their product.

    Attributes
    ----------
    mask : bool, broadcasting to (..., H, Sq, Sk)
        True lets query i see key j.
    bias : float, broadcasting to (..., H, Sq, Sk)
        Added to the logits; -inf masks.
    is_causal : bool
        Key j is seen by query i if j <= p_i, the position p_i = i + q_offset.
    q_offset : int or (B,) ints
        Position of the first query among the keys.
    window : (left, right)
        Keys p_i - left <= j <= p_i + right are seen; -1 leaves that side unbounded.
    scale : float
        Factor of q . k, by default 1 / sqrt(D).
    softcap : float
        If positive, logits become softcap * tanh(logits / softcap).
    alibi_slopes : (H,) or (B, H)
        Adds -slope_h * \\|p_i - j\\| (Press et al. 2022, https://arxiv.org/abs/2108.12409).
    sinks : (H,)
        A logit for each head that joins the softmax's denominator, and the LSE, and nothing else.
    q_lengths, kv_lengths : int or (B,) ints
        Queries or keys at and beyond the length are masked.
    segment_ids : (B, S), or a tuple of two, (B, Sq) and (B, Sk), of ints
        A query sees the keys of its own segment.
    dropout_p : float
        Probability with which a weight is dropped; kept ones are scaled by 1 / (1 - dropout_p).
        A dropped weight is a weight of 0, not a mask. At 1 all are dropped.
    seed : int
        Decides which, together with the pair's place: see `dropout_mask`.
    first_sample : int
        Number of the first sample, for dropout; the packed form counts its sequences by it.
    """

    mask: ArrayLike | None = None
    bias: ArrayLike | None = None
    is_causal: bool = False
    q_offset: ArrayLike = 0
    window: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: ArrayLike | None = None
    sinks: ArrayLike | None = None
    q_lengths: ArrayLike | None = None
    kv_lengths: ArrayLike | None = None
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None
    dropout_p: float = 0.0
    seed: int | None = None
    first_sample: int = 0


def forward(q: Array, k: Array, v: Array, rules: Rules) -> tuple[Array, Array]:
    """out and lse of q (..., H, Sq, D), k (..., Hkv, Sk, D), v (..., Hkv, Sk, Dv)."""
    group = _group(q, k)
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        # 1 to 5. the final logits
        s, allowed, _ = _logits(q, k, rules)
        # 6. softmax over the allowed keys, a sink joining the denominator only
        seen = allowed.any(axis=-1, keepdims=True)
        top = s.max(axis=-1, initial=-np.inf, keepdims=True)
        sinks = np.full(1, -np.inf) if rules.sinks is None else np.asarray(rules.sinks)
        sinks = sinks[:, None, None]
        top = np.where(seen, np.maximum(top, sinks), 0.0)
        p = np.exp(s - top)
        total = p.sum(axis=-1, keepdims=True) + np.where(seen, np.exp(sinks - top), 0.0)
        lse = (top + np.log(total))[..., 0]
        p = p / np.where(seen, total, 1.0)
        # 7. dropout
        p = p * _kept(p.shape, rules)
        # 8. out = p v
        return _sum_over_allowed(p, v, allowed), lse


def backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, dlse: Array, rules: Rules
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """dq, dk, dv, dbias, dsinks; shapes as in `forward`."""
    hkv, group = k.shape[-3], _group(q, k)
    k, v = np.repeat(k, group, axis=-3), np.repeat(v, group, axis=-3)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        # 1 to 5 again, and p from the LSE. A row that sees nothing takes part in nothing.
        s, allowed, slope = _logits(q, k, rules)
        seen = allowed.any(axis=-1)
        p = np.where(allowed, np.exp(s - np.where(seen, lse, 0.0)[..., None]), 0.0)
        # 8. out = p v, p the weights that 7. dropout left
        kept = _kept(p.shape, rules)
        dv = _sum_over_allowed(_t(p * kept), dout, _t(allowed))
        dp = kept * (dout @ _t(v))
        # 6. softmax; d(lse)/ds = p too
        shared = np.where(seen, (dout * out).sum(axis=-1) - dlse, 0.0)
        ds = np.where(allowed, p * (dp - shared[..., None]), 0.0)
        dsinks = None
        if rules.sinks is not None:
            sinks = np.asarray(rules.sinks, np.float64)
            p_sink = np.where(seen, np.exp(sinks[:, None] - lse), 0.0)
            dsinks = _reduce_to(-p_sink * shared, (*sinks.shape, 1))[..., 0]
        # 4. bias
        dbias = None if rules.bias is None else _reduce_to(ds, np.shape(rules.bias))
        # 2. softcap, 1. scale * q k^T
        ds = np.where(allowed, _scale(q, rules) * ds * slope, 0.0)
        dq = _sum_over_allowed(ds, k, allowed)
        dk = _sum_over_allowed(_t(ds), q, _t(allowed))
        return dq, _sum_group(dk, hkv, group), _sum_group(dv, hkv, group), dbias, dsinks


def _kept(shape: tuple[int, ...], rules: Rules) -> Array | float:
    """What dropout multiplies each weight (..., H, Sq, Sk) by: 0 or 1 / (1 - dropout_p)."""
    p = rounded(rules.dropout_p)
    if not p:
        return 1.0
    samples = math.prod(shape[:-3])
    mask = dropout_mask(rules.seed, p, (samples, *shape[-3:]), first=rules.first_sample)
    return mask.reshape(shape) / (1.0 - p if p < 1 else 1.0)


def _logits(q: Array, k: Array, rules: Rules) -> tuple[Array, Array, Array | float]:
    """Final logits, which pairs are allowed, and d(softcapped)/d(scaled); (..., H, Sq, Sk)."""
    # 1. scale * q k^T
    s = _scale(q, rules) * (q @ _t(k))
    slope: Array | float = 1.0
    # 2. softcap
    if rules.softcap > 0:
        bent = np.tanh(s / rules.softcap)
        s, slope = rules.softcap * bent, 1.0 - bent**2
    # 3. ALiBi
    batch = q.shape[:-3]
    i, j = np.arange(q.shape[-2])[:, None], np.arange(k.shape[-2])
    p_i = i + _per_sample(rules.q_offset, batch)
    if rules.alibi_slopes is not None:
        slopes = np.asarray(rules.alibi_slopes, np.float64)
        slopes = slopes if slopes.ndim < 2 else slopes.reshape(*batch, -1)
        s = s - slopes[..., None, None] * abs(p_i - j)
    allowed = np.ones(s.shape, bool)
    # 4. bias, whose -inf masks
    if rules.bias is not None:
        bias = np.broadcast_to(np.asarray(rules.bias, np.float64), s.shape)
        s, allowed = s + bias, ~np.isneginf(bias)
    # 5. every rule must allow the pair
    if rules.mask is not None:
        allowed = allowed & np.broadcast_to(np.asarray(rules.mask, bool), s.shape)
    if rules.is_causal:
        allowed = allowed & (j <= p_i)
    if rules.window is not None:
        left, right = rules.window
        allowed = allowed & ((left < 0) | (j >= p_i - left)) & ((right < 0) | (j <= p_i + right))
    if rules.q_lengths is not None:
        allowed = allowed & (i < _per_sample(rules.q_lengths, batch))
    if rules.kv_lengths is not None:
        allowed = allowed & (j < _per_sample(rules.kv_lengths, batch))
    if rules.segment_ids is not None:
        ids = rules.segment_ids
        q_ids, k_ids = ids if isinstance(ids, tuple) else (ids, ids)
        q_ids = np.reshape(q_ids, (*batch, 1, q.shape[-2], 1))
        allowed = allowed & (q_ids == np.reshape(k_ids, (*batch, 1, 1, k.shape[-2])))
    return np.where(allowed, s, -np.inf), allowed, slope


def _sum_over_allowed(weights: Array, rows: Array, allowed: Array) -> Array:
    """sum_j weights_ij rows_jc over the allowed pairs; weights are 0 at all others.

    A matrix product would let 0 * NaN of a masked pair in, so rows that are not finite are
    taken one by one.
    """
    finite = np.asarray(np.isfinite(rows).all(axis=-1, keepdims=True))
    total = weights @ np.where(finite, rows, 0.0)
    odd = np.where(finite, 0.0, rows)
    odd_anywhere = np.any(~finite, axis=(*range(finite.ndim - 2), -1))
    for j in np.flatnonzero(odd_anywhere):
        at = np.s_[..., j : j + 1]
        total = total + np.where(allowed[at], weights[at] * odd[..., j : j + 1, :], 0.0)
    return total


def _reduce_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of ``shape`` was broadcast to x."""
    extra = x.ndim - len(shape)
    x = np.sum(x, axis=tuple(range(extra)))
    ones = tuple(axis for axis, n in enumerate(shape) if n == 1)
    return np.asarray(np.sum(x, axis=ones, keepdims=True))


def _per_sample(x: ArrayLike, batch: tuple[int, ...]) -> Any:
    """One int, or one for each sample, shaped to broadcast to (..., H, Sq, Sk)."""
    x = np.asarray(x)
    return x if x.ndim == 0 else x.reshape(*batch, 1, 1, 1)


def _scale(q: Array, rules: Rules) -> float:
    return float(max(q.shape[-1], 1) ** -0.5 if rules.scale is None else rules.scale)


def _group(q: Array, k: Array) -> int:
    """Query heads for each key head."""
    return int(q.shape[-3] // max(k.shape[-3], 1))


def _sum_group(x: Array, hkv: int, group: int) -> Array:
    """(..., H, S, D) to (..., Hkv, S, D)."""
    shape = (*x.shape[:-3], hkv, group, *x.shape[-2:])
    return np.asarray(x.reshape(shape).sum(axis=-3))


def _t(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)

"""The oracle: every rule of attention, forward and backward, in plain NumPy and float64.

It is written to be read beside the formula, not to be fast: it forms the (Sq, Sk) score matrix, so
memory is O(B H Sq Sk), and it takes anything NumPy can turn into float64. The forward steps are
numbered; the backward quotes them in reverse. Names, arguments and layouts are those of
``fusedattn.attention`` and its companions; results are always float64. `dropout_mask` says which
weights dropout keeps. It checks little: shapes that do not broadcast fail in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fusedattn.reference._dropout import dropout_mask
from fusedattn.reference._formula import Array, Rules, _logits, backward, forward

__all__ = [
    "AttentionGradients",
    "Rules",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_vjp",
    "backward",
    "dropout_mask",
    "forward",
    "logits",
]


class AttentionGradients(NamedTuple):
    """Gradients of one call; what ``need`` does not name is None.

    ``dq``, ``dk`` and ``dv`` have the shapes of q, k and v; ``dbias`` that of bias, summed over
    its broadcast axes; ``dsinks`` that of sinks.
    """

    dq: Array | None = None
    dk: Array | None = None
    dv: Array | None = None
    dbias: Array | None = None
    dsinks: Array | None = None


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    layout: str = "bhsd",
    out: Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
    **rules: Any,
) -> Any:
    """softmax(scale * q k^T, by the rules) v.

    Parameters
    ----------
    q, k, v : (..., H, Sq, D), (..., Hkv, Sk, D), (..., Hkv, Sk, Dv)
        Or (..., S, H, D) with ``layout="bshd"``, or (S, D) for one head. Hkv divides H; query
        head h reads key head h // (H / Hkv).
    layout : "bhsd" or "bshd"
        Of q, k, v and out.
    out : float64 (..., H, Sq, Dv), optional
        Written to and returned, if given.
    num_threads : int, optional
        Unused; there for the sake of the common signature.
    return_lse : bool
        Also return the LSE.
    **rules
        The fields of `Rules`.

    Returns
    -------
    out : float64 (..., H, Sq, Dv)
        0 for a query that sees no key.
    lse : float64 (..., H, Sq), if return_lse
        log of the sum of exp of the final logits, the sink included; -inf if no key is seen.
    """
    qh, kh, vh = (_heads_first(x, layout) for x in (q, k, v))
    result, lse = forward(qh, kh, vh, Rules(**rules))
    result, lse = _as_given(result, layout, np.ndim(q)), lse if np.ndim(q) > 2 else lse[0]
    if out is not None:
        out[...] = result
        result = out
    return (result, lse) if return_lse else result


def attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    layout: str = "bhsd",
    dlse: ArrayLike | None = None,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
    **rules: Any,
) -> AttentionGradients:
    """Gradients of `attention` from those of its results.

    Parameters
    ----------
    dout, q, k, v, out, lse
        Gradient of out, then arguments and results of the forward call, in ``layout``.
    dlse : (..., H, Sq), optional
        Gradient of the LSE, by default 0.
    need : some of "q", "k", "v", "bias", "sinks"
        Which gradients to return.
    layout, num_threads, **rules
        As in the forward call.
    """
    doh, qh, kh, vh, oh = (_heads_first(x, layout) for x in (dout, q, k, v, out))
    rows = doh.shape[:-1]
    lse = np.asarray(lse, np.float64).reshape(rows)
    dlse = np.zeros(rows) if dlse is None else np.asarray(dlse, np.float64).reshape(rows)
    dq, dk, dv, dbias, dsinks = backward(doh, qh, kh, vh, oh, lse, dlse, Rules(**rules))
    dq, dk, dv = (_as_given(x, layout, np.ndim(q)) for x in (dq, dk, dv))
    grads = {"q": dq, "k": dk, "v": dv, "bias": dbias, "sinks": dsinks}
    return AttentionGradients(*(x if name in need else None for name, x in grads.items()))


def attention_vjp(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    need: Sequence[str] = ("q", "k", "v"),
    **options: Any,
) -> tuple[Array, Callable[[ArrayLike], AttentionGradients]]:
    """The output of `attention`, and vjp(dout), the gradients in ``need`` of sum(dout * out)."""
    out, lse = attention(q, k, v, return_lse=True, **options)

    def vjp(dout: ArrayLike) -> AttentionGradients:
        return attention_backward(dout, q, k, v, out, lse, need=need, **options)

    return out, vjp


def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    num_threads: int | None = None,
    return_lse: bool = False,
    **rules: Any,
) -> Any:
    """`attention` of sequences laid end to end: sequence n is rows cu_seqlens[n] to [n + 1].

    Parameters
    ----------
    q, k, v : (Tq, H, D), (Tk, Hkv, D), (Tk, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : (N + 1,) ints, ascending from 0 to Tq and Tk
    **rules
        The fields of `Rules`, sequences in place of samples: q_offset, q_lengths and kv_lengths as
        (N,), alibi_slopes as (H,) or (N, H), and mask and bias broadcasting to (N, H, max Sq, max
        Sk), of which sequence n uses [n, :, :Sq_n, :Sk_n]. segment_ids are packed like the rows:
        (T,), or a tuple of two, (Tq,) and (Tk,).

    Returns
    -------
    out : float64 (Tq, H, Dv)
    lse : float64 (H, Tq), if return_lse
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape[:2] + v.shape[2:]), np.full(q.shape[1::-1], -np.inf)
    for i, j, rules_n in _sequences(cu_seqlens_q, cu_seqlens_k, rules):
        out[i], lse[:, i] = attention(q[i], k[j], v[j], layout="bshd", return_lse=True, **rules_n)
    return (out, lse) if return_lse else out


def attention_varlen_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
    **rules: Any,
) -> AttentionGradients:
    """Gradients of `attention_varlen`; dlse is (H, Tq)."""
    dout, q, k, v, out, lse = (np.asarray(x, np.float64) for x in (dout, q, k, v, out, lse))
    dlse = np.zeros_like(lse) if dlse is None else np.asarray(dlse, np.float64)
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    dbias, dsinks = (
        None if rules.get(name) is None else np.zeros(np.shape(rules[name]))
        for name in ("bias", "sinks")
    )
    for n, (i, j, rules_n) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k, rules)):
        rows = dout[i], q[i], k[j], v[j], out[i], lse[:, i]
        grads = attention_backward(
            *rows, layout="bshd", dlse=dlse[:, i], need=("q", "k", "v", "bias", "sinks"), **rules_n
        )
        dq[i], dk[j], dv[j] = grads.dq, grads.dk, grads.dv
        if dbias is not None:
            _of_sequence(dbias, n, i, j)[...] += grads.dbias
        if dsinks is not None:
            dsinks += grads.dsinks
    total = {"q": dq, "k": dk, "v": dv, "bias": dbias, "sinks": dsinks}
    return AttentionGradients(*(x if name in need else None for name, x in total.items()))


def logits(q: ArrayLike, k: ArrayLike, *, layout: str = "bhsd", **rules: Any) -> Array:
    """The final logits, (..., H, Sq, Sk) in float64: -inf where a rule masks.

    Parameters
    ----------
    q, k, layout, **rules
        As in `attention`; sinks and dropout, which come later, have no effect.
    """
    qh, kh = (_heads_first(x, layout) for x in (q, k))
    kh = np.repeat(kh, qh.shape[-3] // max(kh.shape[-3], 1), axis=-3)
    with np.errstate(invalid="ignore", over="ignore"):
        s = _logits(qh, kh, Rules(**rules))[0]
    return s if np.ndim(q) > 2 else np.asarray(s[0])


def _sequences(
    cu_q: ArrayLike, cu_k: ArrayLike, rules: dict[str, Any]
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """For each sequence its slice of queries, its slice of keys, and its rules."""
    cu_q, cu_k = np.asarray(cu_q), np.asarray(cu_k)
    rules = {name: value for name, value in rules.items() if value is not None}
    ids = rules.get("segment_ids")
    q_ids, k_ids = ids if isinstance(ids, tuple) else (ids, ids)
    for n in range(cu_q.shape[0] - 1):
        i, j = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        own = {**rules, "first_sample": n}
        for name in ("q_offset", "q_lengths", "kv_lengths"):
            if np.ndim(rules.get(name, 0)):
                own[name] = np.asarray(rules[name])[n]
        if np.ndim(rules.get("alibi_slopes", 0)) == 2:
            own["alibi_slopes"] = np.asarray(rules["alibi_slopes"])[n]
        for name in rules.keys() & {"mask", "bias"}:
            own[name] = _of_sequence(np.asarray(rules[name]), n, i, j)
        if ids is not None:
            own["segment_ids"] = np.asarray(q_ids)[i], np.asarray(k_ids)[j]
        yield i, j, own


def _of_sequence(x: Array, n: int, i: slice, j: slice) -> Array:
    """The part [n, :, :Sq_n, :Sk_n] of what broadcasts to (N, H, max Sq, max Sk), a view."""
    if x.ndim == 4:
        x = x[n if x.shape[0] > 1 else 0]
    if x.ndim > 0 and x.shape[-1] > 1:
        x = x[..., : j.stop - j.start]
    if x.ndim > 1 and x.shape[-2] > 1:
        x = x[..., : i.stop - i.start, :]
    return x


def _heads_first(x: ArrayLike, layout: str) -> Array:
    """x as float64 (..., H, S, D)."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: expected 'bhsd' or 'bshd', got {layout!r}")
    array: Array = np.asarray(x, np.float64)
    if array.ndim == 2:
        return array[None]
    return np.swapaxes(array, -2, -3) if layout == "bshd" else array


def _as_given(x: Array, layout: str, ndim: int) -> Array:
    """Undo `_heads_first`."""
    if ndim == 2:
        return np.asarray(x[0])
    return np.ascontiguousarray(np.swapaxes(x, -2, -3)) if layout == "bshd" else x

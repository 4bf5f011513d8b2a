"""The public attention functions: convert, check each argument in order, call the core.

Shapes are written with the field's letters: B batch, H query heads, Hkv key/value heads, Sq and Sk
query and key lengths, D head dimension of q and k, Dv of v.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numpy.typing import ArrayLike, NDArray

from fusedattn import _core

Array = NDArray[Any]


class AttentionGradients(NamedTuple):
    """Gradients of attention; ``None`` for what was not asked for."""

    dq: Array | None
    dk: Array | None
    dv: Array | None
    dbias: Array | None
    dsinks: Array | None


GRADIENTS = ("q", "k", "v", "bias", "sinks")


def needs_of(need: Sequence[str]) -> tuple[bool, ...]:
    """Whether each of `GRADIENTS` is needed."""
    if isinstance(need, str):
        need = (need,)
    for name in need:
        if name not in GRADIENTS:
            raise ValueError(f"need: expected names among {GRADIENTS}, got {name!r}")
    return tuple(name in need for name in GRADIENTS)


def seed_of(seed: Any, dropout_p: Any) -> Any:
    """A fresh seed where dropout wants one and none was given."""
    return int.from_bytes(os.urandom(8), "little") if seed is None and dropout_p else seed


def line_up(
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: Any = False,
    q_offset: Any = 0,
    window: Any = None,
    scale: Any = None,
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> tuple[Any, ...]:
    """The rules in the order in which the core reads them."""
    return (
        mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, q_lengths,
        kv_lengths, segment_ids, dropout_p, seed_of(seed, dropout_p),
    )  # fmt: skip


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike = 0,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    out: Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Softmax attention, ``softmax(scale * q @ k^T + bias) @ v``, without the score matrix.

    Online softmax in tiles (Milakov and Gimelshein, 2018; Dao et al., *FlashAttention*, 2022). The
    logits are ``s_ij = scale * (q_i . k_j)``, then softcap, ALiBi and bias in this order, minus
    infinity where a rule forbids the pair (i, j); the softmax runs over j. Scratch memory is linear
    in the lengths. B below is the number of samples, the product of the leading dimensions.

    Parameters
    ----------
    q : array, shape (..., H, Sq, D), or (..., Sq, H, D) with ``layout="bshd"``
        Queries, float32, float64, float16 or bfloat16 (ml_dtypes); NumPy or anything with
        ``__array__`` or DLPack on the CPU. Any number of leading dimensions, any strides; (S, D) is
        a single head.
    k : array, shape (..., Hkv, Sk, D) or (..., Sk, Hkv, D)
        Keys. Hkv divides H: query head h reads key/value head ``h // (H // Hkv)``.
    v : array, shape (..., Hkv, Sk, Dv) or (..., Sk, Hkv, Dv)
        Values.
    mask : boolean array, optional
        True where query i may see key j; broadcasts to (..., H, Sq, Sk) in either layout and is
        never expanded in memory.
    bias : array of q's dtype, optional
        Added to the logits; broadcasts as `mask` does. An entry of minus infinity masks.
    is_causal : bool, default False
        Query i sees keys ``j <= i + q_offset`` only.
    q_offset : int or integer array of shape (B,), default 0
        Position of the first query among the keys. 0 aligns top-left (PyTorch, JAX, ONNX),
        ``Sk - Sq`` bottom-right (FlashAttention).
    window : (left, right), optional
        Query i sees keys from ``p - left`` to ``p + right`` only, ends included, where
        ``p = i + q_offset``; -1 is no end. With `is_causal`, right is at most 0.
    scale : float, optional
        Default ``1 / sqrt(D)``.
    q_lengths : int or integer array of shape (B,), optional
        Queries at and beyond this position are padding: out 0, LSE minus infinity, gradients 0.
        Default Sq.
    kv_lengths : int or integer array of shape (B,), optional
        Keys at and beyond this position are padding. Default Sk.
    softcap : float, default 0
        If positive, logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, 2024).
    alibi_slopes : float array of shape (H,) or (B, H), optional
        Logits fall by ``slope * |i + q_offset - j|`` (Press et al., *ALiBi*, 2022).
    sinks : float array of shape (H,), optional
        A logit for each head that joins the sum of its softmax, and the LSE, but has no value
        (Xiao et al., *Attention sinks*, 2024).
    segment_ids : integer array of shape (B, S), or a pair ((B, Sq), (B, Sk)), optional
        A query sees the keys whose number equals its own: documents packed in one row.
    dropout_p : float, default 0
        Each probability is dropped with this probability; what is kept is divided by
        ``1 - dropout_p``. It counts to the nearest multiple of 2**-16. Philox4x32-10 (Salmon et
        al., 2011) keyed by seed, sample, head, query and key decides:
        :func:`fusedattn.reference.dropout_mask` gives the same mask.
    seed : int, optional
        From 0 to 2**64 - 1; by default a fresh one, which leaves no way to the gradients but
        :func:`attention_vjp`.
    layout : {"bhsd", "bshd"}, default "bhsd"
    out : array, optional
        Where to write the result: shape and dtype of the result, memory of its own, any strides.
    num_threads : int, optional
        Default :func:`get_num_threads`. Results do not depend on it.
    return_lse : bool, default False
        Return the log-sum-exp as well.

    Returns
    -------
    out : array, shape of q with Dv in place of D
        0 for a query that sees no key.
    lse : array, shape (..., H, Sq), only with ``return_lse=True``
        Natural-log sum of exp of the logits, the sink's included; minus infinity for a query that
        sees no key.

    Raises
    ------
    TypeError, ValueError
        Wrong input; the message names the argument, what was expected and what came. Nothing is
        written to `out`.

    Notes
    -----
    NaN and infinity in a slot that is allowed propagate; what lies in a masked slot of k, v or
    bias, even NaN, reaches nothing. For one instruction set the bits are the same for any number of
    threads, alone or in a batch, padded or packed.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 2, 3, 4), dtype=np.float32)
    >>> attention(x, x, x, is_causal=True).shape
    (1, 2, 3, 4)
    """
    rules = (
        mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, q_lengths,
        kv_lengths, segment_ids, dropout_p, seed_of(seed, dropout_p),
    )  # fmt: skip
    return _core.attention(q, k, v, rules, layout, out, num_threads, return_lse)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike = 0,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    layout: str = "bhsd",
    dlse: Any = None,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
) -> AttentionGradients:
    """Gradients of :func:`attention`, recomputing the probabilities from the log-sum-exp.

    With ``P = exp(S - lse)``, ``dP = dout v^T`` and ``delta = rowsum(dout * out)``:
    ``dS = P * (dP - delta)``, ``dv = P^T dout``, ``dq = scale * dS k``, ``dk = scale * dS^T q``,
    ``dbias = dS`` summed over the axes along which the bias was broadcast (Dao et al., 2022). With
    dropout P is the kept and scaled one, but in ``dS``; with a softcap, ``dS`` times
    ``1 - tanh**2`` gives dq and dk; dlse is taken from delta; ``dsinks = -sum_i exp(sink - lse_i)
    * delta_i``.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of a scalar by the output.
    q, k, v : arrays
        As given to :func:`attention`, and likewise every rule.
    out, lse : arrays
        As :func:`attention` returned them with ``return_lse=True``.
    need : sequence of {"q", "k", "v", "bias", "sinks"}, default ("q", "k", "v")
        Which gradients to compute.
    dlse : array, shape of lse, optional
        Gradient of the scalar by lse; default 0.

    Returns
    -------
    AttentionGradients
        Named tuple (dq, dk, dv, dbias, dsinks) of arrays shaped and typed like the inputs; what
        `need` does not name is None. A query that sees no key has gradient 0.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.
    """
    rules = (
        mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, q_lengths,
        kv_lengths, segment_ids, dropout_p, seed,
    )  # fmt: skip
    gradients = _core.attention_backward(
        dout, q, k, v, out, lse, dlse, rules, layout, num_threads, needs_of(need)
    )
    return AttentionGradients(*gradients)


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
    **rules: Any,
) -> tuple[Array, Callable[..., AttentionGradients]]:
    """Attention and its vector-Jacobian product.

    Parameters
    ----------
    q, k, v, num_threads, **rules
        As in :func:`attention`; `out` and `return_lse` have no meaning here.
    need : sequence of {"q", "k", "v", "bias", "sinks"}, default ("q", "k", "v")
        Which gradients `vjp` computes.

    Returns
    -------
    out : array
    vjp : function
        ``vjp(dout, dlse=None)`` gives the :class:`AttentionGradients` of ``sum(dout * out) +
        sum(dlse * lse)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`.
    """
    for name in ("out", "return_lse"):
        if name in rules:
            raise TypeError(f"{name}: not an argument of attention_vjp")
    needs_of(need)
    rules["seed"] = seed_of(rules.get("seed"), rules.get("dropout_p"))
    out, lse = attention(q, k, v, num_threads=num_threads, return_lse=True, **rules)

    def vjp(dout: Any, dlse: Any = None) -> AttentionGradients:
        return attention_backward(
            dout, q, k, v, out, lse, dlse=dlse, need=need, num_threads=num_threads, **rules
        )

    return out, vjp

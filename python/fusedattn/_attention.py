"""The public attention functions: convert, check each argument in order, call the core.

Shapes are written with the field's letters: B batch, H query heads, Hkv key/value heads, Sq and Sk
query and key lengths, D head dimension of q and k, Dv of v.
"""

from __future__ import annotations

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


def _refuse(**rules: Any) -> None:
    """Raise for a rule that is part of the interface but not of this version."""
    for name, value in rules.items():
        if value is not None and not (name in ("softcap", "dropout_p") and value == 0.0):
            raise NotImplementedError(f"{name}: this rule is not implemented yet; leave it out")


def _rules(
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: Any = False,
    q_offset: Any = 0,
    window: Any = None,
    scale: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
) -> tuple[Any, ...]:
    """The rules in the order in which the core reads them."""
    return (mask, bias, is_causal, q_offset, window, scale, q_lengths, kv_lengths)


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
    logits are ``s_ij = scale * (q_i . k_j) + bias_ij``, minus infinity where a rule forbids the
    pair (i, j); the softmax runs over j. Scratch memory is linear in the lengths.

    Parameters
    ----------
    q : array, shape (..., H, Sq, D), or (..., Sq, H, D) with ``layout="bshd"``
        Queries, float32 or float64; NumPy or anything with ``__array__`` or DLPack on the CPU. Any
        number of leading dimensions, any strides; (S, D) is a single head.
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
    softcap, alibi_slopes, sinks, segment_ids, dropout_p, seed
        Not implemented yet; must be left at their defaults.
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
        Natural-log sum of exp of the logits; minus infinity for a query that sees no key.

    Raises
    ------
    TypeError, ValueError
        Wrong input; the message names the argument, what was expected and what came. Nothing is
        written to `out`.
    NotImplementedError
        A rule or dtype that is not there yet.

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
    _refuse(
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        segment_ids=segment_ids,
        dropout_p=dropout_p,
        seed=seed,
    )
    rules = _rules(
        mask=mask, bias=bias, is_causal=is_causal, q_offset=q_offset, window=window, scale=scale,
        q_lengths=q_lengths, kv_lengths=kv_lengths,
    )  # fmt: skip
    return _core.attention(q, k, v, rules, layout, out, num_threads, return_lse)


def _needs(
    need: Sequence[str], known: tuple[str, ...] = ("q", "k", "v", "bias")
) -> tuple[bool, ...]:
    """Whether dq, dk, dv and dbias are needed."""
    if isinstance(need, str):
        need = (need,)
    for name in need:
        if name == "sinks":
            raise NotImplementedError("need: 'sinks' is not implemented yet; leave it out")
        if name not in known:
            raise ValueError(f"need: expected names among {known}, got {name!r}")
    return tuple(name in need for name in ("q", "k", "v", "bias"))


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
    ``dbias = dS`` summed over the axes along which the bias was broadcast (Dao et al., 2022).

    Parameters
    ----------
    dout : array, shape of out
        Gradient of a scalar by the output.
    q, k, v : arrays
        As given to :func:`attention`, and likewise every rule.
    out, lse : arrays
        As :func:`attention` returned them with ``return_lse=True``.
    need : sequence of {"q", "k", "v", "bias"}, default ("q", "k", "v")
        Which gradients to compute.
    dlse : None
        Gradient by lse; not implemented yet.

    Returns
    -------
    AttentionGradients
        Named tuple (dq, dk, dv, dbias, dsinks) of arrays shaped and typed like the inputs; what
        `need` does not name is None. A query that sees no key has gradient 0.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`attention`.
    """
    _refuse(
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        segment_ids=segment_ids,
        dropout_p=dropout_p,
        seed=seed,
        dlse=dlse,
    )
    rules = _rules(
        mask=mask, bias=bias, is_causal=is_causal, q_offset=q_offset, window=window, scale=scale,
        q_lengths=q_lengths, kv_lengths=kv_lengths,
    )  # fmt: skip
    gradients = _core.attention_backward(
        dout, q, k, v, out, lse, rules, layout, num_threads, _needs(need)
    )
    return AttentionGradients(*gradients, None)


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
    **rules: Any,
) -> tuple[Array, Callable[[Any], AttentionGradients]]:
    """Attention and its vector-Jacobian product.

    Parameters
    ----------
    q, k, v, num_threads, **rules
        As in :func:`attention`; `out` and `return_lse` have no meaning here.
    need : sequence of {"q", "k", "v", "bias"}, default ("q", "k", "v")
        Which gradients `vjp` computes.

    Returns
    -------
    out : array
    vjp : function
        ``vjp(dout)`` gives the :class:`AttentionGradients` of ``sum(dout * out)``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`attention`.
    """
    for name in ("out", "return_lse"):
        if name in rules:
            raise TypeError(f"{name}: not an argument of attention_vjp")
    _needs(need)
    out, lse = attention(q, k, v, num_threads=num_threads, return_lse=True, **rules)

    def vjp(dout: Any) -> AttentionGradients:
        return attention_backward(
            dout, q, k, v, out, lse, need=need, num_threads=num_threads, **rules
        )

    return out, vjp


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    is_causal: bool = False,
    q_offset: int | ArrayLike = 0,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over sequences packed end to end: sequence n sees its own keys only.

    Parameters
    ----------
    q : array, shape (Tq, H, D)
        Queries of all sequences; any strides, so a view of a fused projection will do.
    k : array, shape (Tk, Hkv, D)
    v : array, shape (Tk, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : integer arrays, shape (N + 1,)
        Sequence n is rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``; ascending from 0 to the
        packed length. Empty sequences are allowed.
    is_causal, window, scale, out, num_threads, return_lse
        As in :func:`attention`.
    q_offset : int or integer array of shape (N,), default 0

    Returns
    -------
    out : array, shape (Tq, H, Dv)
    lse : array, shape (H, Tq), only with ``return_lse=True``

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`attention`.
    """
    rules = _rules(is_causal=is_causal, q_offset=q_offset, window=window, scale=scale)
    return _core.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, rules, out, num_threads, return_lse
    )


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    is_causal: bool = False,
    q_offset: int | ArrayLike = 0,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    need: Sequence[str] = ("q", "k", "v"),
    num_threads: int | None = None,
) -> AttentionGradients:
    """Gradients of :func:`attention_varlen`.

    Parameters
    ----------
    dout, out : arrays, shape (Tq, H, Dv)
    lse : array, shape (H, Tq)
    q, k, v, cu_seqlens_q, cu_seqlens_k, is_causal, q_offset, window, scale, num_threads
        As given to :func:`attention_varlen`.
    need : sequence of {"q", "k", "v"}, default all three

    Returns
    -------
    AttentionGradients

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`attention`.
    """
    rules = _rules(is_causal=is_causal, q_offset=q_offset, window=window, scale=scale)
    gradients = _core.attention_varlen_backward(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rules, num_threads,
        _needs(need, ("q", "k", "v")),
    )  # fmt: skip
    return AttentionGradients(*gradients, None)


def cpu_info() -> dict[str, Any]:
    """What runs here.

    Returns
    -------
    dict
        ``isa`` the instruction set in use, ``isas`` those this CPU runs (best last), ``isas_built``
        those in this build, ``num_threads``, ``parallel`` what the parallel loop stands on,
        ``compiler``, ``build_type``, ``cpu`` the model's name.

    Raises
    ------
    ValueError
        If FUSEDATTN_ISA names an instruction set that is unknown or not supported here.
    """
    import platform

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                name,
            )
    except OSError:
        pass
    return {**_core.cpu_info(), "cpu": name}


def get_num_threads() -> int:
    """Threads that a call uses by default.

    Returns
    -------
    int
        What :func:`set_num_threads` chose, else FUSEDATTN_NUM_THREADS, else OpenMP's number
        (OMP_NUM_THREADS), else the CPUs this process may run on; a limit set through threadpoolctl
        lowers it.
    """
    return _core.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Choose the default number of threads.

    Parameters
    ----------
    n : int or None
        At least 1; None goes back to the environment's choice. Results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        Not an integer, or out of range.
    """
    _core.set_num_threads(n)

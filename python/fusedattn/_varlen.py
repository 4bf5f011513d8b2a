"""Attention over sequences of different lengths, packed end to end: no padding anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusedattn import _core
from fusedattn._attention import Array, AttentionGradients, needs_of
from fusedattn._rules import rules_of, takes_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fusedattn._rules import RuleKeywords


@takes_rules
def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    out: Array | None = None,
    num_threads: int | None = None,
    return_lse: bool = False,
    **rules: Unpack[RuleKeywords],
) -> Any:
    """Attention over sequences packed end to end: sequence n sees its own keys only.

    Every rule of :func:`fusedattn.attention` holds inside each sequence, counted from its start;
    the result is what that function gives for the padded arrays, bit for bit.

    Parameters
    ----------
    q : array, shape (Tq, H, D)
        Queries of all sequences; any strides, so a view of a fused projection will do.
    k : array, shape (Tk, Hkv, D)
    v : array, shape (Tk, Hkv, Dv)
    cu_seqlens_q, cu_seqlens_k : integer arrays, shape (N + 1,)
        Sequence n is rows ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``; ascending from 0 to the
        packed length. Empty sequences are allowed.
    mask, bias : arrays, optional
        Broadcast to (N, H, Sq, Sk) of the longest sequences; sequence n reads its own corner.
    q_offset, q_lengths, kv_lengths : int or integer array of shape (N,), optional
    alibi_slopes : float array of shape (H,) or (N, H), optional
    segment_ids : integer array of shape (T,), or a pair ((Tq,), (Tk,)), optional
    is_causal, window, scale, softcap, sinks, dropout_p, seed, out, num_threads, return_lse
        As in :func:`fusedattn.attention`; dropout takes n for the sample.

    Returns
    -------
    out : array, shape (Tq, H, Dv)
    lse : array, shape (H, Tq), only with ``return_lse=True``

    Raises
    ------
    TypeError, ValueError
        As :func:`fusedattn.attention`.
    """
    drawn = rules_of(rules).drawn()
    return _core.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, drawn, out, num_threads, return_lse
    )


@takes_rules
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
    dlse: Any = None,
    need: Sequence[str] = ("q", "k", "v"),
    into: tuple[Array, Array, Array] | None = None,
    num_threads: int | None = None,
    **rules: Unpack[RuleKeywords],
) -> AttentionGradients:
    """Gradients of :func:`attention_varlen`.

    Parameters
    ----------
    dout, out : arrays, shape (Tq, H, Dv)
    lse : array, shape (H, Tq)
    q, k, v, cu_seqlens_q, cu_seqlens_k, and every rule
        As given to :func:`attention_varlen`.
    dlse : array, shape (H, Tq), optional
        Gradient of the scalar by lse; default 0.
    need : sequence of {"q", "k", "v", "bias", "sinks"}, default ("q", "k", "v")
        Which gradients to compute.
    into : tuple of three arrays, optional
        Where dq, dk and dv are written: of the shapes and dtype of q, k and v, with any strides, so
        three views of one array will do; they may not overlap each other or an input.
    num_threads : int, optional

    Returns
    -------
    AttentionGradients

    Raises
    ------
    TypeError, ValueError
        As :func:`fusedattn.attention`.
    """
    gradients = _core.attention_varlen_backward(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, rules_of(rules),
        num_threads, needs_of(need), into,
    )  # fmt: skip
    return AttentionGradients(*gradients)

"""The ONNX operator ``Attention``, opsets 23 to 25, on the fused kernel.

For onnx's own evaluator, by one more argument::

    from onnx.reference import ReferenceEvaluator
    from fusedattn.integrations.onnx import new_ops

    session = ReferenceEvaluator("model.onnx", new_ops=new_ops())

`attention` is the operator as a function of NumPy arrays, and needs no onnx.

No score matrix is formed, unless the node has the output that is one, qk_matmul_output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedattn
from fusedattn import reference

__all__ = ["attention", "new_ops"]

Array = NDArray[Any]

DOUBLE = 11  # TensorProto.DataType of float64


def attention(
    Q: Array,
    K: Array,
    V: Array,
    attn_mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = None,
    right_window_size: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    softmax_precision: int | None = None,
    with_scores: bool = False,
) -> tuple[Array, Array, Array, Array | None]:
    """The operator, https://onnx.ai/onnx/operators/onnx__Attention.html, with its own names.

    Every input, attribute and output has its meaning; what differs is precision. The softmax is
    computed in float32, for float64 arrays and for ``softmax_precision`` DOUBLE in float64; a lower
    precision than float32 is never used. A scale may be negative.

    Parameters
    ----------
    Q : (B, Hq, Sq, D) or (B, Sq, Hq * D) array
        float32, float64, float16 or bfloat16.
    K, V : (B, Hkv, Sk, D) or (B, Sk, Hkv * D) and the same with Dv
    attn_mask : array broadcasting to (B, Hq, Sq, P + Sk), optional
        Boolean, True taking part, or numbers to be added to the logits. Fewer keys than there are
        mean that the others are masked.
    past_key, past_value : (B, Hkv, P, D) and (B, Hkv, P, Dv) arrays, optional
        Keys and values that come before K and V.
    nonpad_kv_seqlen : (B,) integer array, optional
        Keys from here on are padding; queries are the last ones before it.
    is_causal : int
        If not 0, a query sees no key after its position: i, plus the keys of the past or
        ``nonpad_kv_seqlen - Sq``.
    q_num_heads, kv_num_heads : int, optional
        Hq and Hkv; needed where Q, K and V have three dimensions.
    left_window_size, right_window_size : int, optional
        Keys from position - left to position + right are seen; -1, the default, is no end.
    scale : float, optional
        By default 1 / sqrt(D).
    softcap : float, optional
        If positive, logits become softcap * tanh(logits / softcap), before masks and biases.
    softmax_precision : int, optional
        A TensorProto.DataType.
    qk_matmul_output_mode : int
        What the last result is: 0 the scaled products of Q and K, 1 those after the softcap, 2
        with bias and masks, 3 the softmax.
    with_scores : bool
        Whether to form it.

    Returns
    -------
    Y : array like Q, Dv in place of D
        0 for a query that sees no key.
    present_key, present_value : (B, Hkv, P + Sk, D) and (B, Hkv, P + Sk, Dv) arrays
    qk_matmul_output : (B, Hq, Sq, P + Sk) array or None

    Raises
    ------
    TypeError, ValueError
        For input that does not fit the above; the message names the argument.
    """
    flat = Q.ndim == 3
    if flat:
        Q, K, V = (
            _heads_first(x, name, heads)
            for x, name, heads in (
                (Q, "q_num_heads", q_num_heads),
                (K, "kv_num_heads", kv_num_heads),
                (V, "kv_num_heads", kv_num_heads),
            )
        )
    else:
        for name, x, heads in (("q_num_heads", Q, q_num_heads), ("kv_num_heads", K, kv_num_heads)):
            if heads is not None and heads != x.shape[1]:
                raise ValueError(f"{name}: expected {x.shape[1]} as in the array, got {heads}")
    if (past_key is None) != (past_value is None):
        raise ValueError("past_value: expected past_key and past_value together, got one of them")
    past = 0
    if past_key is not None and past_value is not None:
        if nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen: expected None with past_key, got an array")
        past = past_key.shape[2]
        K, V = (np.concatenate(pair, axis=2) for pair in ((past_key, K), (past_value, V)))

    rules: dict[str, Any] = {"scale": scale, "softcap": softcap or 0.0}
    masks: dict[str, Any] = {"is_causal": bool(is_causal), "q_offset": past}
    left, right = (-1 if n is None else n for n in (left_window_size, right_window_size))
    if (left, right) != (-1, -1):
        masks["window"] = left, right
    if nonpad_kv_seqlen is not None:
        masks["kv_lengths"] = nonpad_kv_seqlen
        masks["q_offset"] = np.asarray(nonpad_kv_seqlen) - Q.shape[2]
    keys = K.shape[2]
    if attn_mask is not None:
        keys = min(keys, attn_mask.shape[-1])
        if attn_mask.dtype == np.bool_:
            masks["mask"] = attn_mask
        else:
            masks["bias"] = attn_mask.astype(Q.dtype, copy=False)

    real = np.float64 if softmax_precision == DOUBLE else Q.dtype
    q, k, v = (x.astype(real, copy=False) for x in (Q, K[:, :, :keys], V[:, :, :keys]))
    if "bias" in masks:
        masks["bias"] = masks["bias"].astype(real, copy=False)
    if nonpad_kv_seqlen is not None:
        masks["kv_lengths"] = np.minimum(nonpad_kv_seqlen, keys)
    Y = fusedattn.attention(q, k, v, **rules, **masks).astype(Q.dtype, copy=False)
    if flat:
        Y = Y.swapaxes(1, 2).reshape(Y.shape[0], Y.shape[2], -1)
    if not with_scores:
        return Y, K, V, None
    scores = _scores(Q, K, keys, qk_matmul_output_mode or 0, rules, masks)
    return Y, K, V, scores.astype(Q.dtype)


def new_ops() -> list[type[Any]]:
    """What ``onnx.reference.ReferenceEvaluator`` takes as its argument of the same name.

    Returns
    -------
    list of one class, the operator ``Attention``

    Raises
    ------
    ImportError
        If the onnx package is not installed.
    """
    try:
        from onnx.reference.op_run import OpRun
    except ImportError as error:
        raise ImportError("onnx is needed: pip install fusedattn[onnx]") from error

    class Attention(OpRun):  # type: ignore[misc]
        op_domain = ""

        def _run(self, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
            outputs = [name != "" for name in self.onnx_node.output]
            with_scores = len(outputs) > 3 and outputs[3]
            results = attention(*inputs, **attributes, with_scores=with_scores)
            return results[: len(outputs)]

    return [Attention]


def _heads_first(x: Array, name: str, heads: int | None) -> Array:
    """(B, S, H * D) to (B, H, S, D), a view."""
    if heads is None or x.shape[-1] % heads:
        raise ValueError(f"{name}: expected a divisor of {x.shape[-1]}, got {heads}")
    return np.asarray(x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2))


def _scores(
    Q: Array, K: Array, keys: int, mode: int, rules: dict[str, Any], masks: dict[str, Any]
) -> Array:
    """qk_matmul_output, the score matrix that was asked for; masks say nothing beyond ``keys``."""
    if mode not in (0, 1, 2, 3):
        raise ValueError(f"qk_matmul_output_mode: expected 0, 1, 2 or 3, got {mode}")
    if mode == 0:
        return reference.logits(Q, K, scale=rules["scale"])
    if mode == 1:
        return reference.logits(Q, K, **rules)
    logits = reference.logits(Q, K[:, :, :keys], **rules, **masks)
    if mode == 3:
        lse = np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        logits = np.exp(logits - np.where(np.isneginf(lse), 0.0, lse))
    scores = np.full((*Q.shape[:3], K.shape[2]), 0.0 if mode == 3 else -np.inf)
    scores[..., :keys] = logits
    return scores

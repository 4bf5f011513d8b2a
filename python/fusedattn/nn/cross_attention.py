"""Multi-head attention from one packed batch to another (arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

import numpy as np

from fusedattn import attention_varlen, attention_varlen_backward
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import VJP2, Array, Params, Rng, Shapes
from fusedattn.nn.linear import linear, linear_shapes
from fusedattn.nn.self_attention import dropout_rules


def cross_attention_shapes(width: int, memory_width: int | None = None) -> Shapes:
    """Projections to queries, to keys and values, and of the result.

    Returns
    -------
    dict
        ``q``, a linear layer from width to width; ``kv``, one from `memory_width` (width where it
        is left out) to 2 * width, rows in the order k, v, each head after head; and ``out``, one
        from width to width.
    """
    return {
        "q": linear_shapes(width, width),
        "kv": linear_shapes(memory_width or width, 2 * width),
        "out": linear_shapes(width, width),
    }


def init_cross_attention(
    rng: Rng, width: int, memory_width: int | None = None, std: float = 0.02
) -> Params:
    """Parameters of `cross_attention_shapes`: weights from N(0, std²), biases 0; float32."""
    return draw(rng, cross_attention_shapes(width, memory_width), std)


def cross_attention(
    params: Params,
    x: Array,
    memory: Array,
    cu_seqlens: Array,
    cu_seqlens_memory: Array,
    num_heads: int,
    *,
    p: float = 0.0,
    rng: Rng | None = None,
) -> tuple[Array, VJP2]:
    """dropout(softmax(Q Kᵀ / √D)) V with queries from `x`, keys and values from `memory`.

    Sequence n of `x` sees the whole of sequence n of `memory`, and nothing else.

    Parameters
    ----------
    params : dict
        As from `init_cross_attention`.
    x : array (T, width)
    memory : array (Tm, memory_width)
    cu_seqlens, cu_seqlens_memory : int arrays (N + 1,)
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1] of `x`, and likewise of `memory`.
    num_heads : int
        H, a divisor of width; D is width / H.
    p, rng
        Dropout's probability, of the attention probabilities, and its source; no dropout without
        `rng`.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx, dmemory).
    """
    tokens, width = x.shape
    shape = (len(memory), 2, num_heads, width // num_heads)
    rules = dropout_rules(p, rng)
    q_rows, q_vjp = linear(params["q"], x)
    kv_rows, kv_vjp = linear(params["kv"], memory)
    q = q_rows.reshape(tokens, num_heads, width // num_heads)
    k, v = kv_rows.reshape(shape).swapaxes(0, 1)
    o, lse = attention_varlen(q, k, v, cu_seqlens, cu_seqlens_memory, return_lse=True, **rules)
    y, out_vjp = linear(params["out"], o.reshape(tokens, width))

    def vjp(dy: Array) -> tuple[Params, Array, Array]:
        dout, do = out_vjp(dy)
        dq, dkv = np.empty_like(q_rows), np.empty_like(kv_rows)
        dk, dv = dkv.reshape(shape).swapaxes(0, 1)
        into = (dq.reshape(q.shape), dk, dv)
        do = do.reshape(o.shape)
        attention_varlen_backward(
            do, q, k, v, o, lse, cu_seqlens, cu_seqlens_memory, into=into, **rules
        )
        dquery, dx = q_vjp(dq)
        dmemory_params, dmemory = kv_vjp(dkv)
        return {"q": dquery, "kv": dmemory_params, "out": dout}, dx, dmemory

    return y, vjp

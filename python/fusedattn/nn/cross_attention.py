"""Multi-head attention from one packed batch to another (arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

import numpy as np

from fusedattn._varlen import attention_varlen, attention_varlen_backward
from fusedattn.nn._types import VJP2, Array, Params, Rng
from fusedattn.nn.linear import init_linear, linear


def init_cross_attention(
    rng: Rng, width: int, memory_width: int | None = None, std: float = 0.02
) -> Params:
    """Projections to queries, to keys and values, and of the result; float32.

    Returns
    -------
    dict
        ``q``, a linear layer from width to width; ``kv``, one from `memory_width` (width where it
        is left out) to 2 * width, rows in the order k, v, each head after head; and ``out``, one
        from width to width.
    """
    return {
        "q": init_linear(rng, width, width, std),
        "kv": init_linear(rng, memory_width or width, 2 * width, std),
        "out": init_linear(rng, width, width, std),
    }


def cross_attention(
    params: Params,
    x: Array,
    memory: Array,
    cu_seqlens: Array,
    cu_seqlens_memory: Array,
    num_heads: int,
) -> tuple[Array, VJP2]:
    """softmax(Q Kᵀ / √D) V with queries from `x`, keys and values from `memory`.

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

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx, dmemory).
    """
    tokens, width = x.shape
    q2, q_vjp = linear(params["q"], x)
    kv2, kv_vjp = linear(params["kv"], memory)
    q = q2.reshape(tokens, num_heads, width // num_heads)
    kv = kv2.reshape(len(memory), 2, num_heads, width // num_heads)
    k, v = kv[:, 0], kv[:, 1]
    o, lse = attention_varlen(q, k, v, cu_seqlens, cu_seqlens_memory, return_lse=True)
    y, out_vjp = linear(params["out"], o.reshape(tokens, width))

    def vjp(dy: Array) -> tuple[Params, Array, Array]:
        dout, do = out_vjp(dy)
        grads = attention_varlen_backward(
            do.reshape(o.shape), q, k, v, o, lse, cu_seqlens, cu_seqlens_memory
        )
        dheads = np.empty(kv.shape, kv.dtype)
        dheads[:, 0], dheads[:, 1] = grads.dk, grads.dv
        dq, dx = q_vjp(np.asarray(grads.dq).reshape(tokens, width))
        dkv, dmemory = kv_vjp(dheads.reshape(kv2.shape))
        return {"q": dq, "kv": dkv, "out": dout}, dx, dmemory

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    params = init_cross_attention(rng, 6, memory_width=4, std=0.5)
    x, memory = rng.standard_normal((5, 6)), rng.standard_normal((8, 4))
    return params, (x, memory, np.array([0, 3, 3, 5]), np.array([0, 2, 4, 8])), {"num_heads": 2}

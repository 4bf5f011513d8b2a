"""Multi-head self-attention over packed sequences, on the fused kernel (arXiv:1706.03762)."""

from __future__ import annotations

import numpy as np

from fusedattn._varlen import attention_varlen, attention_varlen_backward
from fusedattn.nn._types import VJP, Array, Params, Rng
from fusedattn.nn.linear import init_linear, linear


def init_self_attention(rng: Rng, width: int, std: float = 0.02) -> Params:
    """One fused projection to queries, keys and values, and one of the result; float32.

    Returns
    -------
    dict
        ``qkv``, a linear layer from width to 3 * width, rows in the order q, k, v, each head after
        head; and ``out``, a linear layer from width to width.
    """
    return {
        "qkv": init_linear(rng, width, 3 * width, std),
        "out": init_linear(rng, width, width, std),
    }


def self_attention(
    params: Params, x: Array, cu_seqlens: Array, num_heads: int, *, is_causal: bool = False
) -> tuple[Array, VJP]:
    """softmax(Q Kᵀ / √D) V inside each sequence and head, between two projections.

    Parameters
    ----------
    params : dict
        As from `init_self_attention`.
    x : array (T, width)
    cu_seqlens : int array (N + 1,)
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1] of `x`.
    num_heads : int
        H, a divisor of width; D is width / H.
    is_causal : bool, default False
        Whether a row sees only itself and those before it, as in a decoder.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx).
    """
    tokens, width = x.shape
    qkv, qkv_vjp = linear(params["qkv"], x)
    # Three strided views (T, H, D); the kernel reads them in place.
    heads = qkv.reshape(tokens, 3, num_heads, width // num_heads)
    q, k, v = heads[:, 0], heads[:, 1], heads[:, 2]
    around = (cu_seqlens, cu_seqlens)
    o, lse = attention_varlen(q, k, v, *around, is_causal=is_causal, return_lse=True)
    y, out_vjp = linear(params["out"], o.reshape(tokens, width))

    def vjp(dy: Array) -> tuple[Params, Array]:
        dout, do = out_vjp(dy)
        grads = attention_varlen_backward(
            do.reshape(o.shape), q, k, v, o, lse, *around, is_causal=is_causal
        )
        dheads = np.empty(heads.shape, heads.dtype)
        for i, dhead in enumerate((grads.dq, grads.dk, grads.dv)):
            dheads[:, i] = dhead
        dqkv, dx = qkv_vjp(dheads.reshape(tokens, 3 * width))
        return {"qkv": dqkv, "out": dout}, dx

    return y, vjp


def example(rng: Rng) -> tuple[Params, tuple[Array, ...], dict[str, object]]:
    """Parameters and arguments of one small call, for the gradient check."""
    params = init_self_attention(rng, 6, std=0.5)
    options: dict[str, object] = {"num_heads": 2, "is_causal": bool(rng.integers(2))}
    return params, (rng.standard_normal((7, 6)), np.array([0, 3, 3, 7])), options

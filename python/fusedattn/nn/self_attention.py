"""Multi-head self-attention over packed sequences, on the fused kernel (arXiv:1706.03762)."""

from __future__ import annotations

from typing import Any

from fusedattn import attention_varlen, attention_varlen_backward
from fusedattn.nn._core_ops import draw_seed, empty
from fusedattn.nn._shapes import draw
from fusedattn.nn._types import Array, Params, ResidualVJP, Rng, Shapes
from fusedattn.nn.linear import linear, linear_shapes


def self_attention_shapes(width: int) -> Shapes:
    """One fused projection to queries, keys and values, and one of the result.

    Returns
    -------
    dict
        ``qkv``, a linear layer from width to 3 * width, rows in the order q, k, v, each head after
        head; and ``out``, a linear layer from width to width.
    """
    return {"qkv": linear_shapes(width, 3 * width), "out": linear_shapes(width, width)}


def init_self_attention(rng: Rng, width: int, std: float = 0.02) -> Params:
    """Parameters of `self_attention_shapes`: weights drawn from N(0, std²), biases 0; float32."""
    return draw(rng, self_attention_shapes(width), std)


def self_attention(
    params: Params,
    x: Array,
    cu_seqlens: Array,
    num_heads: int,
    *,
    is_causal: bool = False,
    added: Array | None = None,
    p: float = 0.0,
    rng: Rng | None = None,
) -> tuple[Array, ResidualVJP]:
    """dropout(softmax(Q Kᵀ / √D)) V inside each sequence and head, between two projections.

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
    added : array (T, width), optional
        Joins y in the same pass; its gradient is dy.
    p, rng
        Dropout's probability, of the attention probabilities, and its source; no dropout without
        `rng`.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx); a second argument joins dx.
    """
    tokens, width = x.shape
    shape = (tokens, 3, num_heads, width // num_heads)
    rules = {"is_causal": is_causal, **dropout_rules(p, rng)}
    qkv, qkv_vjp = linear(params["qkv"], x)
    # Three strided views (T, H, D); the kernel reads them in place, and writes their gradients so.
    q, k, v = qkv.reshape(shape).swapaxes(0, 1)
    o, lse = attention_varlen(q, k, v, cu_seqlens, cu_seqlens, return_lse=True, **rules)
    y, out_vjp = linear(params["out"], o.reshape(tokens, width), added=added)

    def vjp(dy: Array, added: Array | None = None) -> tuple[Params, Array]:
        dout, do = out_vjp(dy)
        dqkv = empty(qkv.shape, qkv.dtype)
        into = tuple(dqkv.reshape(shape).swapaxes(0, 1))
        attention_varlen_backward(
            do.reshape(o.shape), q, k, v, o, lse, cu_seqlens, cu_seqlens, into=into, **rules
        )
        dprojection, dx = qkv_vjp(dqkv, added)
        return {"qkv": dprojection, "out": dout}, dx

    return y, vjp


def dropout_rules(p: float, rng: Rng | None) -> dict[str, Any]:
    """The arguments that give attention this dropout, with a seed drawn for this call."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a probability in [0, 1), got {p}")
    return {} if rng is None or p == 0.0 else {"dropout_p": p, "seed": draw_seed(rng)}

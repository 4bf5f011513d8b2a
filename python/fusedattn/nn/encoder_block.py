"""One Transformer encoder block, post-norm (arXiv:1706.03762) or pre-norm (arXiv:2002.04745)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusedattn.nn._shapes import draw
from fusedattn.nn._types import VJP, Array, Params, ResidualVJP, Rng, Shapes
from fusedattn.nn.dropout import dropout
from fusedattn.nn.feed_forward import feed_forward, feed_forward_shapes
from fusedattn.nn.layer_norm import layer_norm, layer_norm_shapes
from fusedattn.nn.self_attention import self_attention, self_attention_shapes


def encoder_block_shapes(width: int, inner: int) -> Shapes:
    """``attention``, ``attention_norm``, ``feed_forward`` and ``feed_forward_norm``."""
    return {
        "attention": self_attention_shapes(width),
        "attention_norm": layer_norm_shapes(width),
        "feed_forward": feed_forward_shapes(width, inner),
        "feed_forward_norm": layer_norm_shapes(width),
    }


def init_encoder_block(rng: Rng, width: int, inner: int, std: float = 0.02) -> Params:
    """Parameters of `encoder_block_shapes`, those of each layer as its own init has them."""
    return draw(rng, encoder_block_shapes(width, inner), std)


def encoder_block(
    params: Params,
    x: Array,
    cu_seqlens: Array,
    num_heads: int,
    *,
    norm_first: bool = False,
    activation: str = "gelu",
    eps: float = 1e-12,
    p: float = 0.0,
    attention_p: float = 0.0,
    rng: Rng | None = None,
) -> tuple[Array, VJP]:
    """Self-attention and a feed-forward layer, each with dropout, a residual and a layer norm.

    Post-norm is ``x = norm(x + dropout(f(x)))``, pre-norm ``x = x + dropout(f(norm(x)))``.

    Parameters
    ----------
    params : dict
        As from `init_encoder_block`.
    x : array (T, width)
    cu_seqlens : int array (N + 1,)
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1] of `x`.
    num_heads : int
        A divisor of width.
    norm_first : bool, default False
        Pre-norm instead of post-norm.
    activation, eps
        Of the feed-forward layer and of the layer norms.
    p, attention_p, rng
        Dropout's probability, of the two branches and of the attention probabilities, and its
        source; no dropout without `rng`.

    Returns
    -------
    y : array (T, width)
    vjp : callable
        dy (T, width) -> (dparams, dx).
    """

    def attention(x: Array, added: Array | None = None) -> tuple[Array, ResidualVJP]:
        options: dict[str, Any] = {"added": added, "p": attention_p, "rng": rng}
        return self_attention(params["attention"], x, cu_seqlens, num_heads, **options)

    def inner(x: Array, added: Array | None = None) -> tuple[Array, ResidualVJP]:
        return feed_forward(params["feed_forward"], x, activation, added=added)

    def norm(name: str, x: Array) -> tuple[Array, VJP]:
        return layer_norm(params[name], x, eps)

    drop = None if rng is None or p == 0.0 else (p, rng)
    if norm_first:
        n1, norm1_vjp = norm("attention_norm", x)
        a, attention_vjp = _join(attention, n1, x, drop)
        n2, norm2_vjp = norm("feed_forward_norm", a)
        y, inner_vjp = _join(inner, n2, a, drop)
    else:
        a, attention_vjp = _join(attention, x, x, drop)
        h, norm1_vjp = norm("attention_norm", a)
        f, inner_vjp = _join(inner, h, h, drop)
        y, norm2_vjp = norm("feed_forward_norm", f)

    def pre_norm_vjp(dy: Array) -> tuple[Params, Array]:
        dinner, dn2 = inner_vjp(dy)
        dnorm2, da = norm2_vjp(dn2)
        da += dy
        dattention, dn1 = attention_vjp(da)
        dnorm1, dx = norm1_vjp(dn1)
        dx += da
        return _gradients(dattention, dnorm1, dinner, dnorm2), dx

    def post_norm_vjp(dy: Array) -> tuple[Params, Array]:
        dnorm2, df = norm2_vjp(dy)
        dinner, dh = inner_vjp(df, df)
        dnorm1, da = norm1_vjp(dh)
        dattention, dx = attention_vjp(da, da)
        return _gradients(dattention, dnorm1, dinner, dnorm2), dx

    return y, pre_norm_vjp if norm_first else post_norm_vjp


def _join(
    layer: Callable[..., tuple[Array, ResidualVJP]],
    x: Array,
    around: Array,
    drop: tuple[float, Rng] | None,
) -> tuple[Array, ResidualVJP]:
    """around + dropout(layer(x)), and the vjp of the second summand."""
    if drop is None:
        return layer(x, around)
    y, vjp = layer(x)
    y, drop_vjp = dropout({}, y, *drop, added=around)
    return y, lambda dy, added=None: vjp(drop_vjp(dy)[1], added)


def _gradients(attention: Params, norm1: Params, inner: Params, norm2: Params) -> Params:
    return {
        "attention": attention,
        "attention_norm": norm1,
        "feed_forward": inner,
        "feed_forward_norm": norm2,
    }

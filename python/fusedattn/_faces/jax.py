"""Attention as JAX and Keras have it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedattn import _core
from fusedattn._rules import Rules

__all__ = ["dot_product_attention"]

Array = NDArray[Any]

# What JAX puts in place of a masked logit, so that a row of them still has a softmax.
MASKED = np.float32(-0.7 * float(np.finfo(np.float32).max))


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: float | None = None,
) -> Any:
    """``jax.nn.dot_product_attention`` for NumPy arrays; Keras's argument names are taken too.

    Same arguments, same meaning, and this too: a query that no mask, causal triangle, window or
    length lets see a key gets the mean of *all* values, since JAX masks with a large negative
    number and not with minus infinity; a padded query gets 0. What differs:

    - The result is a NumPy array; gradients are in `attention_vjp` with ``layout="bshd"``.
    - What lies in a masked slot never reaches the other results, not even NaN.
    - A bias of minus infinity masks. Where it alone forbids a query every key, the result is 0;
      JAX's is NaN.
    - bias has the dtype of query and may, like mask, have fewer than four dimensions.
    - value may have another last dimension than key.
    - float64 is computed in float64; JAX's softmax is of float32.

    Parameters
    ----------
    query : (B, T, N, H) or (T, N, H) array
    key : (B, S, K, H) or (S, K, H) array
        K divides N.
    value : (B, S, K, Hv) or (S, K, Hv) array
    bias : array broadcasting to (B, N, T, S), optional
        Added to the logits.
    mask : bool array broadcasting to (B, N, T, S), optional
        True takes part.
    scale : float, optional
        By default 1 / sqrt(H).
    is_causal : bool
        Query i sees keys 0 to i.
    query_seq_lengths, key_value_seq_lengths : (B,) integer arrays, optional
        What lies beyond is padding.
    local_window_size : int or (left, right), optional
        Query i sees keys i - left to i + right; one number is both.
    implementation : None or "xla"
        There is one implementation.
    return_residual : bool
        Return the log-sum-exp too.
    flash_attention : bool, optional
        Keras's choice of a kernel: ignored, it is always fused.
    attn_logits_soft_cap : float, optional
        Keras's: logits become cap * tanh(logits / cap), before the bias is added.

    Returns
    -------
    out : array of query's shape, Hv in place of H
    residual : (B, T, N) or (T, N) array of key's dtype, only with ``return_residual=True``

    Raises
    ------
    TypeError, ValueError
        For input that does not fit the above; the message names the argument.
    """
    if implementation not in (None, "xla"):
        raise ValueError(f"implementation: expected None or 'xla', got {implementation!r}")
    masks = Rules(
        mask=mask,
        is_causal=bool(is_causal),
        window=_window(local_window_size),
        q_lengths=query_seq_lengths,
        kv_lengths=key_value_seq_lengths,
    )
    cap = 0.0 if attn_logits_soft_cap is None else attn_logits_soft_cap
    rules = masks._replace(bias=bias, scale=scale, softcap=cap)
    out, lse = _core.attention(query, key, value, rules, "bshd", return_lse=True)
    residual = np.swapaxes(lse, -1, -2)
    blind = np.isneginf(residual)
    if blind.any():
        if bias is not None:  # blind by the masks alone?
            _, lse = _core.attention(query, key, value, masks, "bshd", return_lse=True)
            blind &= np.swapaxes(np.isneginf(lse), -1, -2)
        residual = np.where(blind, MASKED, residual)
        blind &= _are_queries(query_seq_lengths, blind)
        _put_mean(out, blind, np.asarray(value))
    return (out, residual.astype(out.dtype)) if return_residual else out


def _window(size: Any) -> tuple[int, int] | None:
    """JAX has no number for no end, so that -1 must not become one."""
    if size is None:
        return None
    left, right = (size, size) if isinstance(size, int) else size
    if left < 0 or right < 0:
        raise ValueError(f"local_window_size: expected no negative number, got {size!r}")
    return left, right


def _are_queries(lengths: ArrayLike | None, like: Array) -> Any:
    """Which of (B, T, N) rows are no padding."""
    if lengths is None:
        return True
    return np.arange(like.shape[-2])[:, None] < np.asarray(lengths).reshape(-1, 1, 1)


def _put_mean(out: Array, rows: Array, value: Array) -> None:
    """Into rows (B, T, N) of out (B, T, N, Hv) the mean of all values (B, S, K, Hv)."""
    wide = np.float64 if value.dtype == np.float64 else np.float32
    mean = value.mean(axis=-3, dtype=wide)
    mean = np.repeat(mean, out.shape[-2] // mean.shape[-2], axis=-2)
    everywhere = np.broadcast_to(mean[..., None, :, :].astype(out.dtype), out.shape)
    out[rows] = everywhere[rows]

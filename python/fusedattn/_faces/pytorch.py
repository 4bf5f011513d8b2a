"""Attention as PyTorch has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedattn import _core
from fusedattn._rules import Rules

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | None = None,
) -> NDArray[Any]:
    """``torch.nn.functional.scaled_dot_product_attention`` for NumPy arrays.

    Same arguments, same meaning. What differs:

    - The result is a NumPy array, and no graph is recorded: gradients are in `attention_vjp`.
    - Leading dimensions of query, key and value must be equal; they do not broadcast, but for the
      head dimension of key and value, which may be 1 as in PyTorch.
    - A mask may have fewer than two dimensions.
    - Together, ``attn_mask`` and ``is_causal`` are always an error, as PyTorch documents; some of
      its kernels let the pair pass.
    - Errors are TypeError and ValueError where PyTorch raises RuntimeError.
    - Dropout draws from no global generator but from ``seed``, an argument that PyTorch lacks; the
      weights that it drops are other ones than PyTorch's.

    A query whose keys are all masked gets 0, as in PyTorch.

    Parameters
    ----------
    query : (..., H, L, E) float array
    key : (..., H, S, E) float array
    value : (..., H, S, Ev) float array
    attn_mask : bool or float array broadcasting to (..., H, L, S), optional
        Where bool, True takes part in attention. Where float, it is added to the logits, and its
        dtype is that of query.
    dropout_p : float
        Probability of dropping an attention weight; the others are scaled by 1 / (1 - dropout_p).
        As in PyTorch there is no training mode: pass 0 for evaluation.
    is_causal : bool
        Query i sees keys 0 to i: the causal triangle starts at the top left also where L and S
        differ.
    scale : float, optional
        Factor of query . key, by default 1 / sqrt(E).
    enable_gqa : bool
        Allow key and value to have fewer heads than query: (..., Hkv, S, E), Hkv dividing H.
    seed : int, optional
        Decides what is dropped, see `attention`; by default another one for each call.

    Returns
    -------
    (..., H, L, Ev) array of query's dtype

    Raises
    ------
    TypeError, ValueError
        For input that does not fit the above; the message names the argument.

    See Also
    --------
    attention : The same with every rule.
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p!r}")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None when is_causal is True, got a mask")
    if not enable_gqa:
        _check_heads(query, key)

    mask, bias = attn_mask, None
    if attn_mask is not None:
        attn_mask = np.asarray(attn_mask)
        mask, bias = (attn_mask, None) if attn_mask.dtype == np.bool_ else (None, attn_mask)
    rules = Rules(
        mask=mask, bias=bias, is_causal=bool(is_causal), scale=scale, dropout_p=dropout_p, seed=seed
    )
    out: NDArray[Any] = _core.attention(query, key, value, rules.drawn())
    return out


def _check_heads(query: Any, key: Any) -> None:
    """Without enable_gqa, key has as many heads as query, or one for all."""
    shapes = tuple(getattr(x, "shape", None) or np.shape(x) for x in (query, key))
    if any(len(shape) < 3 for shape in shapes):
        return
    heads, heads_kv = (int(shape[-3]) for shape in shapes)
    if heads_kv not in (1, heads):
        raise ValueError(
            f"key: expected {heads} heads as query has, or enable_gqa=True, got {heads_kv}"
        )

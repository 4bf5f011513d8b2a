"""Attention as the flash-attn package has it: causal triangles and windows start bottom right."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusedattn import _core
from fusedattn._kvcache import KVCache, attention_with_kvcache
from fusedattn._rules import Rules

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

Array = NDArray[Any]


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seed: int | None = None,
) -> Any:
    """``flash_attn.flash_attn_func`` for NumPy arrays.

    Same arguments, same meaning: the last query is aligned with the last key, so query i is at
    position ``i + Sk - Sq``. What differs:

    - The result is a NumPy array, and no graph is recorded: gradients are in `attention_vjp` with
      ``layout="bshd"`` and ``q_offset=Sk - Sq``.
    - float32, float64 and any head dimension are taken too; v may have another one.
    - It is always deterministic.
    - The LSE of a query that sees no key is minus infinity; flash-attn's is plus infinity.
    - With ``return_attn_probs`` the third result is None: the probabilities are never formed.
    - Dropout draws from ``seed``, an argument that flash-attn lacks.

    Parameters
    ----------
    q : (B, Sq, H, D) array
    k : (B, Sk, Hkv, D) array
        Hkv divides H.
    v : (B, Sk, Hkv, Dv) array
    dropout_p : float
        Probability of dropping a weight; the others are scaled by 1 / (1 - dropout_p).
    softmax_scale : float, optional
        By default 1 / sqrt(D).
    causal : bool
        Query i sees no key after ``i + Sk - Sq``.
    window_size : (left, right)
        Query i sees keys ``i + Sk - Sq - left`` to ``i + Sk - Sq + right``; -1 is no end.
    softcap : float
        If positive, logits become softcap * tanh(logits / softcap).
    alibi_slopes : (H,) or (B, H) array, optional
        Adds -slope * \\|i + Sk - Sq - j\\| to the logits.
    deterministic : bool
        Ignored.
    return_attn_probs : bool
        Return the log-sum-exp too.
    seed : int, optional
        Decides what is dropped, see `attention`; by default another one for each call.

    Returns
    -------
    out : (B, Sq, H, Dv) array
    softmax_lse : (B, H, Sq) array, only with ``return_attn_probs=True``
    S_dmask : None, only with ``return_attn_probs=True``

    Raises
    ------
    TypeError, ValueError
        As `attention`.
    """
    sq, sk = (int(np.shape(x)[-3]) if np.ndim(x) > 2 else 0 for x in (q, k))
    rules = Rules(
        is_causal=bool(causal), q_offset=sk - sq, window=window_size, scale=softmax_scale,
        softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    result = _core.attention(q, k, v, rules.drawn(), "bshd", return_lse=return_attn_probs)
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: ArrayLike | None = None,
    *,
    seed: int | None = None,
) -> Any:
    """``flash_attn.flash_attn_varlen_func`` for NumPy arrays.

    As `flash_attn_func`, of sequences packed end to end, each with its own Sq and Sk; gradients are
    in `attention_varlen_backward`. What differs besides: the longest lengths are not needed, and
    pages are gathered into memory of the size of the keys and values.

    Parameters
    ----------
    q : (Tq, H, D) array
    k : (Tk, Hkv, D) array, or with a block table pages, (num_pages, page_size, Hkv, D)
    v : the same with Dv
    cu_seqlens_q, cu_seqlens_k : (N + 1,) integer arrays
        Sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1].
    max_seqlen_q, max_seqlen_k : int, optional
        Ignored.
    block_table : (N, M) integer array, optional
        Token t of sequence n is row ``t % page_size`` of page ``block_table[n, t // page_size]``.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, \
return_attn_probs, seed
        As in `flash_attn_func`.

    Returns
    -------
    out : (Tq, H, Dv) array
    softmax_lse : (H, Tq) array, only with ``return_attn_probs=True``
    S_dmask : None, only with ``return_attn_probs=True``

    Raises
    ------
    TypeError, ValueError
        As `attention_varlen`, and for a block table that names no page.
    """
    cu_q, cu_k = np.asarray(cu_seqlens_q), np.asarray(cu_seqlens_k)
    if block_table is not None:
        k, v = _packed(k, v, np.diff(cu_k), block_table)
    aligned = cu_q.shape == cu_k.shape and cu_q.ndim == 1  # the core says if not
    rules = Rules(
        is_causal=bool(causal), q_offset=np.diff(cu_k) - np.diff(cu_q) if aligned else 0,
        window=window_size, scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    result = _core.attention_varlen(
        q, k, v, cu_q, cu_k, rules.drawn(), return_lse=return_attn_probs
    )
    return (*result, None) if return_attn_probs else result


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Array,
    v_cache: Array,
    k: Any = None,
    v: Any = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """``flash_attn.flash_attn_with_kvcache`` for NumPy arrays.

    Same arguments, same meaning; k and v are written into the caches in place. `KVCache` and
    `attention_with_kvcache` do the same and keep the lengths. What differs, besides what
    `flash_attn_func` lists:

    - Rotary embeddings are the caller's: rotate q and k before the call.
    - Where k is given, so must be cache_seqlens.
    - A call that fails leaves the caches as they were.

    Parameters
    ----------
    q : (B, Sq, H, D) array
    k_cache : (Bc, S, Hkv, D) NumPy array, or with a block table pages, (P, page_size, Hkv, D)
    v_cache : the same with Dv
    k, v : (B, n, Hkv, D) and (B, n, Hkv, Dv) arrays, optional
        Written behind the tokens of each sequence before attention.
    rotary_cos, rotary_sin : None
    cache_seqlens : int or (B,) integer array, optional
        Tokens of each sequence before the call, by default S. Not changed by it.
    cache_batch_idx : (B,) integer array, optional
        Which rows of the caches are those of the batch, by default the first to the last.
    cache_leftpad : (B,) integer array, optional
        The first so many tokens of each sequence are padding.
    block_table : (B, M) integer array, optional
        Token t of sequence b is row ``t % page_size`` of page ``block_table[b, t // page_size]``.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in `flash_attn_func`, Sk being the tokens after the call.
    rotary_interleaved, num_splits
        Ignored.
    return_softmax_lse : bool
        Return the log-sum-exp too.

    Returns
    -------
    out : (B, Sq, H, Dv) array
    softmax_lse : (B, H, Sq) array, only with ``return_softmax_lse=True``

    Raises
    ------
    TypeError, ValueError
        As `attention_with_kvcache`.
    """
    for name, given in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if given is not None:
            raise ValueError(f"{name}: expected None, q and k being rotated already, got an array")
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx: expected None with a block_table, got an array")
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("cache_seqlens: expected where k is given, got None")
        pages = 1 if block_table is None else np.shape(block_table)[-1]
        cache_seqlens = np.shape(k_cache)[1] * pages
    if cache_batch_idx is not None:
        block_table = np.asarray(cache_batch_idx).reshape(-1, 1)
    cache = KVCache.over(k_cache, v_cache, cache_seqlens, block_table=block_table, layout="bshd")
    rules: dict[str, Any] = {}
    if cache_leftpad is not None:
        longest = cache.lengths.max(initial=0) + (0 if k is None else np.shape(k)[1])
        pad = np.asarray(cache_leftpad).reshape(-1, 1, 1, 1)
        rules["mask"] = np.arange(longest) >= pad
    return attention_with_kvcache(
        q, cache, k=k, v=v, is_causal=bool(causal), window=window_size, scale=softmax_scale,
        softcap=softcap, alibi_slopes=alibi_slopes, return_lse=return_softmax_lse, **rules,
    )  # fmt: skip


def _packed(k: Any, v: Any, lengths: Array, block_table: ArrayLike) -> tuple[Array, Array]:
    """Tokens from the pages of sequences of these lengths, end to end."""
    k, v = np.asarray(k), np.asarray(v)
    KVCache.over(k, v, lengths, block_table=block_table, layout="bshd")  # checks
    table, size = np.asarray(block_table), k.shape[1]
    n, t = np.nonzero(np.arange(lengths.max(initial=0)) < lengths[:, None])
    at = table[n, t // size], t % size
    return k[at], v[at]

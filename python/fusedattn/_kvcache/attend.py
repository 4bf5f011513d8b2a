"""Attention to what a cache holds: prompts, pieces of prompts and decoding are the same call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fusedattn import _core
from fusedattn._kvcache.cache import KVCache
from fusedattn._kvcache.checks import check_layout, per_sequence
from fusedattn._rules import rules_of

__all__ = ["attention_with_kvcache"]


def attention_with_kvcache(
    q: Any,
    cache: KVCache,
    *,
    k: Any = None,
    v: Any = None,
    q_lengths: ArrayLike | None = None,
    is_causal: bool = True,
    layout: str | None = None,
    out: Any = None,
    num_threads: int | None = None,
    return_lse: bool = False,
    **rules: Any,
) -> Any:
    """Attention of the last queries of each sequence to all of its keys so far.

    The queries sit at the end: with `lengths` tokens in the cache (after appending), query i of n
    is at position ``lengths - n + i``. So one function serves the prompt, the next piece of a
    prompt and decoding.

    Parameters
    ----------
    q : array, shape (B, H, Sq, D), or (B, Sq, H, D) with ``layout="bshd"``
        Queries of the cache's dtype.
    cache : KVCache
    k, v : arrays, optional
        Appended to the cache first, see :meth:`KVCache.append`; in the cache's layout.
    q_lengths : int or integer array of shape (B,), optional
        Only the first so many of the rows of q (and of k and v) are tokens, by default all; the
        others give out 0 and LSE minus infinity.
    is_causal : bool, default True
        A query sees no key after its own position.
    layout : {"bhsd", "bshd"}, optional
        Of q and out, by default the cache's.
    out, num_threads, return_lse
        As in :func:`attention`.
    **rules
        Any other rule of :func:`attention`: window, scale, softcap, alibi_slopes, sinks, mask,
        bias. A mask or a bias has as many keys as the longest sequence after appending.
        ``q_offset`` and ``kv_lengths`` are the cache's to say.

    Returns
    -------
    out : array, shape of q with Dv in place of D
    lse : array, shape (B, H, Sq), only with ``return_lse=True``

    Raises
    ------
    TypeError, ValueError
        As :func:`attention` and :meth:`KVCache.append`; the cache's lengths and pages are left as
        they were, and in arrays given to :meth:`KVCache.over` every byte.

    Notes
    -----
    Keys are read where they are, whether contiguous or in pages.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    for name in ("q_offset", "kv_lengths"):
        if name in rules:
            raise TypeError(f"{name}: not an argument of attention_with_kvcache; the cache says")
    if (k is None) != (v is None):
        raise ValueError("v: expected k and v together or neither, got one of them")
    layout = cache.layout if layout is None else layout
    check_layout(layout)
    shape = tuple(getattr(q, "shape", None) or np.shape(q))
    if len(shape) != 4 or shape[0] != len(cache.lengths):
        raise ValueError(f"q: expected 4 dimensions, B = {len(cache.lengths)}, got shape {shape}")
    length = shape[2 if layout == "bhsd" else 1]
    counts = np.full(shape[0], length)
    if q_lengths is not None:
        counts = per_sequence("q_lengths", q_lengths, shape[0], length)
    before, overwritten = cache.lengths, []
    try:
        if k is not None:
            overwritten = cache._append(k, v, None if q_lengths is None else counts)
        lengths = cache.lengths
        given = rules_of(
            {
                **rules,
                "is_causal": is_causal,
                "q_offset": lengths - counts,
                "kv_lengths": lengths,
                "q_lengths": None if q_lengths is None else counts,
            }
        ).drawn()
        table, keys, values = cache.block_table, cache.k, cache.v
        if table is None:
            keys, values = cache.keys_and_values()
        if layout != cache.layout:
            keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        if table is None:
            return _core.attention(q, keys, values, given, layout, out, num_threads, return_lse)
        return _core.attention_paged(
            q, keys, values, table, given, layout, out, num_threads, return_lse
        )
    except BaseException:
        cache.truncate(before)
        for own, place, numbers in reversed(overwritten):
            own[place] = numbers
        raise

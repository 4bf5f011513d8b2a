"""Keys and values kept from call to call: contiguous, or in pages that a block table lists.

Inside, a contiguous cache is a paged one whose pages hold a whole sequence each, so both are
written by the same code. Pages are those of PagedAttention (Kwon et al., *Efficient memory
management for large language model serving*, SOSP 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fusedattn._kvcache.checks import check_layout, check_sizes, per_sequence

__all__ = ["KVCache"]

Array = NDArray[Any]
DTYPES = ("float32", "float64", "float16", "bfloat16")


class KVCache:
    """Room for the keys and values of a batch of sequences, each of its own length.

    Parameters
    ----------
    batch_size : int
    max_length : int
        Most tokens that a sequence may have.
    heads : int
        Key/value heads, Hkv; query heads are a multiple of it.
    head_dim : int
        D, of the keys.
    head_dim_v : int, optional
        Dv, of the values; by default D.
    dtype : dtype, default float32
        float32, float64, float16 or bfloat16 (``ml_dtypes``); that of the queries.
    page_size : int, optional
        Keep tokens in pages of so many, taken by a sequence as it grows and given back by
        `truncate`. By default every sequence has `max_length` tokens of its own.
    num_pages : int, optional
        Pages for all sequences together, by default enough for all to be full.
    layout : {"bhsd", "bshd"}, default "bhsd"
        Order of the axes of `k` and `v`, and of what `append` takes.

    Attributes
    ----------
    k, v : arrays
        The storage: (B, Hkv, max_length, D) and the same with Dv, or pages, (num_pages, Hkv,
        page_size, D); with ``layout="bshd"`` heads and tokens change places. What lies beyond a
        sequence's length is whatever was there; it never reaches a result.

    Raises
    ------
    TypeError, ValueError
        For a number below 1 or a dtype that attention does not take.

    Examples
    --------
    >>> import numpy as np
    >>> from fusedattn import KVCache, attention_with_kvcache
    >>> cache = KVCache(batch_size=2, max_length=16, heads=1, head_dim=4)
    >>> x = np.ones((2, 1, 3, 4), np.float32)
    >>> attention_with_kvcache(x, cache, k=x, v=x).shape  # a prompt of three tokens
    (2, 1, 3, 4)
    >>> x = np.ones((2, 1, 1, 4), np.float32)
    >>> attention_with_kvcache(x, cache, k=x, v=x).shape  # one more
    (2, 1, 1, 4)
    >>> cache.lengths
    array([4, 4])
    """

    k: Array
    v: Array
    _free: list[int] | None  # pages that we hand out

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: DTypeLike = np.float32,
        page_size: int | None = None,
        num_pages: int | None = None,
        layout: str = "bhsd",
    ) -> None:
        sizes = {"batch_size": batch_size, "max_length": max_length, "heads": heads}
        optional = {"head_dim_v": head_dim_v, "page_size": page_size, "num_pages": num_pages}
        given = {name: size for name, size in optional.items() if size is not None}
        check_sizes({**sizes, "head_dim": head_dim, **given})
        if page_size is None and num_pages is not None:
            raise ValueError(f"num_pages: expected None without page_size, got {num_pages}")
        check_layout(layout)
        pages, rows, table = batch_size, max_length, np.arange(batch_size)[:, None]
        if page_size is not None:
            each = -(-max_length // page_size)
            pages, rows = batch_size * each if num_pages is None else num_pages, page_size
            table = np.full((batch_size, each), -1)
        shape = (pages, heads, rows) if layout == "bhsd" else (pages, rows, heads)
        k = np.empty((*shape, head_dim), dtype)
        v = np.empty((*shape, head_dim if head_dim_v is None else head_dim_v), dtype)
        self._adopt(k, v, np.zeros(batch_size, np.int64), table, max_length, layout)
        self._paged = page_size is not None
        self._free = list(range(pages))[::-1] if self._paged else None

    @classmethod
    def over(
        cls,
        k: Array,
        v: Array,
        lengths: ArrayLike,
        *,
        block_table: ArrayLike | None = None,
        layout: str = "bhsd",
    ) -> KVCache:
        """A cache in arrays that are there already; `append` writes into them.

        Parameters
        ----------
        k : NumPy array, shape (B, Hkv, S, D) or (B, S, Hkv, D)
            With a block table pages, (num_pages, Hkv, page_size, D) or (num_pages, page_size, Hkv,
            D). Any strides.
        v : NumPy array, the same with Dv
        lengths : int or integer array of shape (B,)
            How many tokens of each sequence are there.
        block_table : integer array of shape (B, M), optional
            Token t of sequence b is row ``t % page_size`` of page ``block_table[b, t //
            page_size]``. Copied. Sequences may share pages that nobody writes to; entries beyond
            what a sequence uses may be anything.
        layout : {"bhsd", "bshd"}, default "bhsd"

        Raises
        ------
        TypeError, ValueError
            Shapes that do not fit, lengths beyond the room, a table entry that is no page.
        """
        check_layout(layout)
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, np.ndarray):
                raise TypeError(f"{name}: expected a NumPy array, got {type(x).__name__}")
            if x.ndim != 4 or 0 in x.shape:
                raise ValueError(f"{name}: expected 4 dimensions, none 0, got shape {x.shape}")
        if v.shape[:3] != k.shape[:3]:
            raise ValueError(f"v: expected shape {(*k.shape[:3], 'Dv')}, got {v.shape}")
        rows = k.shape[2 if layout == "bhsd" else 1]
        table = np.arange(k.shape[0])[:, None]
        if block_table is not None:
            table = np.array(block_table)
            if table.dtype.kind not in "iu":
                raise TypeError(f"block_table: expected integers, got {table.dtype}")
            if table.ndim != 2:
                raise ValueError(f"block_table: expected shape (B, M), got {table.shape}")
        cache = cls.__new__(cls)
        room = table.shape[1] * rows
        counts = per_sequence("lengths", lengths, len(table), room)
        cache._adopt(k, v, counts, table.astype(np.int64), room, layout)
        cache._paged = block_table is not None
        cache._is_over = True
        cache._check_pages(cache._table, counts)
        return cache

    def _adopt(
        self, k: Array, v: Array, lengths: Array, table: Array, max_length: int, layout: str
    ) -> None:
        if k.dtype.name not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {k.dtype}")
        if v.dtype != k.dtype:
            raise TypeError(f"v: expected {k.dtype} as k, got {v.dtype}")
        self.k, self.v, self._layout, self._max_length = k, v, layout, max_length
        self._lengths: NDArray[np.int64] = lengths
        self._table: NDArray[np.int64] = table
        self._free = None
        self._paged = False
        self._is_over = False

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence, a copy of shape (B,)."""
        return np.array(self._lengths)

    @property
    def max_length(self) -> int:
        """Most tokens that a sequence may have."""
        return self._max_length

    @property
    def layout(self) -> str:
        """ "bhsd" or "bshd"."""
        return self._layout

    @property
    def block_table(self) -> NDArray[np.int64] | None:
        """Pages of each sequence in order, a copy of shape (B, M), -1 for none; None if unpaged."""
        return self._table.copy() if self._paged else None

    def append(self, k: Any, v: Any, lengths: ArrayLike | None = None) -> None:
        """Put tokens at the end of every sequence.

        Parameters
        ----------
        k : array, shape (B, Hkv, S, D), or (B, S, Hkv, D) with the cache's layout "bshd"
        v : array, the same with Dv
        lengths : int or integer array of shape (B,), optional
            Only the first so many of the S rows of each sequence are tokens; 0 leaves it alone.

        Raises
        ------
        TypeError, ValueError
            Wrong shapes or dtypes, a sequence beyond `max_length`, no page left, a table entry
            that is no page. The cache is left as it was.
        """
        self._append(k, v, lengths)

    def _append(self, k: Any, v: Any, lengths: ArrayLike | None) -> list[tuple[Array, Any, Array]]:
        """`append`; in arrays of the caller's, what was overwritten: array, place, numbers."""
        k, v = np.asarray(k), np.asarray(v)
        batch = len(self._lengths)
        rows = k.shape[2 if self._layout == "bhsd" else 1] if k.ndim == 4 else 0
        for name, x, own in (("k", k, self.k), ("v", v, self.v)):
            heads, dim = own.shape[1 if self._layout == "bhsd" else 2], own.shape[3]
            pair = (heads, rows) if self._layout == "bhsd" else (rows, heads)
            if x.shape != (batch, *pair, dim):
                expected = f"({batch}, {heads}, S, {dim})"
                expected = expected if self._layout == "bhsd" else f"({batch}, S, {heads}, {dim})"
                raise ValueError(f"{name}: expected shape {expected}, S as k's, got {x.shape}")
            if x.dtype != own.dtype:
                raise TypeError(f"{name}: expected {own.dtype} as the cache, got {x.dtype}")
        counts = np.full(batch, rows)
        if lengths is not None:
            counts = per_sequence("lengths", lengths, batch, rows)
        ends = self._lengths + counts
        if np.any(ends > self._max_length):
            full = int(np.argmax(ends > self._max_length))
            raise ValueError(
                f"k: expected at most {self._max_length - self._lengths[full]} more tokens for "
                f"sequence {full} of a cache of max_length {self._max_length}, got {counts[full]}"
            )
        table, taken = self._allocated(ends)
        self._check_pages(table, ends)
        # From here on nothing fails.
        before = []
        for own, x in ((self.k, k), (self.v, v)):
            own, x = self._tokens_first(own), self._tokens_first(x)
            for b, place, rows in self._places(table, ends):
                if self._is_over:
                    before.append((own, place, own[place].copy()))
                own[place] = x[b, rows]
        self._lengths, self._table = ends, table
        if self._free is not None:
            del self._free[len(self._free) - taken :]
        return before

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the tokens of each sequence beyond a length; pages that this empties are free.

        Parameters
        ----------
        lengths : int or integer array of shape (B,)
            New lengths, at most the old ones.

        Raises
        ------
        TypeError, ValueError
            The cache is left as it was.
        """
        counts = per_sequence("lengths", lengths, len(self._lengths), self._lengths)
        if self._free is not None:
            given_back = ~self._used(counts) & (self._table >= 0)
            self._free.extend(self._table[given_back].tolist())
            self._table = np.where(given_back, -1, self._table)
        self._lengths = counts

    @property
    def _page_size(self) -> int:
        return int(self.k.shape[2 if self._layout == "bhsd" else 1])

    def _places(self, table: Array, ends: Array) -> Iterator[tuple[int, Any, slice]]:
        """Where what comes behind each sequence's tokens goes, up to its end, a page at a time.

        Of each piece the sequence, the place in the storage, and which of the new rows.
        """
        size = self._page_size
        for b, (first, end) in enumerate(zip(self._lengths.tolist(), ends.tolist(), strict=True)):
            at = first
            while at < end:
                stop = min(end, (at // size + 1) * size)
                place = table[b, at // size], slice(at % size, at % size + stop - at)
                yield b, place, slice(at - first, stop - first)
                at = stop

    def _tokens_first(self, x: Array) -> Array:
        """A view with the axes (pages or samples, tokens, heads, dim)."""
        return x.swapaxes(1, 2) if self._layout == "bhsd" else x

    def _allocated(self, ends: Array) -> tuple[Array, int]:
        """The block table with pages for so many tokens, and how many are taken from the free."""
        if self._free is None:
            return self._table, 0
        missing = self._used(ends) & (self._table < 0)
        count = int(missing.sum())
        if count > len(self._free):
            raise ValueError(
                f"k: expected to need at most the {len(self._free)} pages left, got {count}"
            )
        table = self._table.copy()
        table[missing] = self._free[len(self._free) - count :][::-1]
        return table, count

    def _check_pages(self, table: Array, ends: Array) -> None:
        """Every page that a sequence uses must be one."""
        pages = len(self.k)
        wrong = np.argwhere(self._used(ends) & ((table < 0) | (table >= pages)))
        if wrong.size:
            at = tuple(int(n) for n in wrong[0])
            raise ValueError(
                f"block_table: expected pages from 0 to {pages - 1}, got {table[at]} at {at}"
            )

    def _used(self, lengths: Array) -> NDArray[np.bool_]:
        """Which entries of the block table sequences of these lengths need; (B, M)."""
        return np.arange(self._table.shape[1]) < -(-lengths // self._page_size)[:, None]

    def keys_and_values(self) -> tuple[Array, Array]:
        """The tokens of all sequences.

        Returns
        -------
        k : array, shape (B, Hkv, S, D), or (B, S, Hkv, D) with ``layout="bshd"``
            S is the longest length; what lies beyond a sequence's own is whatever was there. A view
            of a contiguous cache, but pages are gathered into memory of their own.
        v : array, the same with Dv
        """
        longest = int(self._lengths.max(initial=0))

        def tokens(x: Array) -> Array:
            x = self._tokens_first(x)
            if self._paged:
                count = -(-longest // self._page_size)
                table = np.where(self._used(self._lengths), self._table, 0)[:, :count]  # 0 for none
                x = x[table].reshape(len(table), count * self._page_size, *x.shape[2:])
            return self._tokens_first(x[:, :longest])

        return tokens(self.k), tokens(self.v)

"""KVCache: prompts, pieces of prompts and decoding are causal attention to everything so far."""

import copy

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import fusedattn
from fusedattn import KVCache, attention_with_kvcache
from tests.accuracy import assert_same
from tests.strategies import DTYPES

B, H, HKV, D, DV, LONGEST = 3, 4, 2, 8, 5, 40
KINDS = ("contiguous", "paged", "over", "over pages")


def make(kind, dtype=np.float32, layout="bhsd", lengths=0, junk=np.nan):
    """An empty cache of each kind, its storage full of junk."""
    sizes = {"batch_size": B, "max_length": LONGEST, "heads": HKV, "head_dim": D, "head_dim_v": DV}
    if kind == "contiguous":
        cache = KVCache(**sizes, dtype=dtype, layout=layout)
    elif kind == "paged":
        cache = KVCache(**sizes, dtype=dtype, layout=layout, page_size=7)
    else:
        pages, rows, table = B, LONGEST, None
        if kind == "over pages":
            pages, rows = 22, 8
            table = np.random.default_rng(0).permutation(pages)[: B * 5].reshape(B, 5)
            table = table.astype(np.int32)
        pair = (HKV, rows) if layout == "bhsd" else (rows, HKV)
        k, v = (np.empty((pages, *pair, dim), dtype) for dim in (D, DV))
        cache = KVCache.over(k, v, lengths, block_table=table, layout=layout)
    cache.k[...], cache.v[...] = junk, junk
    return cache


def sequence(dtype, layout="bhsd", seed=0, total=LONGEST):
    rng = np.random.default_rng(seed)
    shapes = (B, H, total, D), (B, HKV, total, D), (B, HKV, total, DV)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return [x.swapaxes(1, 2) for x in arrays] if layout == "bshd" else arrays


def tokens(x, a, b, layout):
    return x[:, a:b] if layout == "bshd" else x[:, :, a:b]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kind", KINDS)
def test_piece_by_piece_is_causal_attention(isa, kind, layout, dtype):
    q, k, v = sequence(dtype, layout)
    whole, lse = fusedattn.attention(q, k, v, is_causal=True, layout=layout, return_lse=True)
    cache = make(kind, dtype, layout)
    at = 0
    for n in (17, 6, 1, 1, 9, 1, 5):
        q_n, k_n, v_n = (tokens(x, at, at + n, layout) for x in (q, k, v))
        out, lse_n = attention_with_kvcache(q_n, cache, k=k_n, v=v_n, return_lse=True)
        # Bit for bit: each row sums the same keys in the same order.
        assert_same(out, tokens(whole, at, at + n, layout))
        assert_same(lse_n, lse[:, :, at : at + n])
        at += n
        np.testing.assert_array_equal(cache.lengths, [at] * B)
    assert at == cache.max_length
    again = attention_with_kvcache(tokens(q, at - 1, at, layout), cache)
    assert_same(again, tokens(whole, at - 1, at, layout))


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_their_own_lengths(isa, kind):
    q, k, v = sequence(np.float32)
    cache = make(kind)
    pieces = [np.array([5, 0, 11]), np.array([1, 20, 0]), np.array([1, 1, 1])]
    lengths = np.zeros(B, int)
    for n in pieces:
        rows = n.max()
        # Rows beyond a sequence's own are junk.
        q_n, k_n, v_n = (
            np.full((*x.shape[:2], rows, x.shape[3]), np.nan, x.dtype) for x in (q, k, v)
        )
        for b in range(B):
            for x_n, x in ((q_n, q), (k_n, k), (v_n, v)):
                x_n[b, :, : n[b]] = x[b, :, lengths[b] : lengths[b] + n[b]]
        out = attention_with_kvcache(q_n, cache, k=k_n, v=v_n, q_lengths=n)
        lengths += n
        np.testing.assert_array_equal(cache.lengths, lengths)
        for b in range(B):
            keys = (x[b, :, : lengths[b]] for x in (k, v))
            alone = fusedattn.attention(
                q_n[b, :, : n[b]], *keys, is_causal=True, q_offset=lengths[b] - n[b]
            )
            np.testing.assert_array_equal(out[b, :, : n[b]], alone)
            assert np.all(out[b, :, n[b] :] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_other_rules_and_options(isa, kind):
    q, k, v = sequence(np.float32)
    cache = make(kind)
    cache.append(k[:, :, :30], v[:, :, :30])
    last, bias = q[:, :, 27:30], np.random.default_rng(1).standard_normal((H, 3, 30))
    rules = {"window": (9, -1), "scale": 0.3, "bias": bias.astype(np.float32)}
    expected = fusedattn.attention(
        last, k[:, :, :30], v[:, :, :30], is_causal=True, q_offset=27, **rules
    )
    out = np.empty_like(expected)
    assert attention_with_kvcache(last, cache, out=out, num_threads=1, **rules) is out
    np.testing.assert_array_equal(out, expected)
    both = fusedattn.attention(last, k[:, :, :30], v[:, :, :30])
    np.testing.assert_array_equal(attention_with_kvcache(last, cache, is_causal=False), both)
    swapped = attention_with_kvcache(last.swapaxes(1, 2), cache, is_causal=False, layout="bshd")
    np.testing.assert_array_equal(swapped, both.swapaxes(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_and_go_on(kind):
    q, k, v = sequence(np.float32)
    cache = make(kind)
    cache.append(k[:, :, :30], v[:, :, :30])
    cache.truncate(np.array([3, 30, 0]))
    np.testing.assert_array_equal(cache.lengths, [3, 30, 0])
    cache.append(k[:, :, 30:35], v[:, :, 30:35])
    out = attention_with_kvcache(q[:, :, :1], cache)
    for b, kept in enumerate((3, 30, 0)):
        keys = (np.concatenate([x[b, :, :kept], x[b, :, 30:35]], axis=1) for x in (k, v))
        np.testing.assert_array_equal(out[b], fusedattn.attention(q[b, :, :1], *keys))
    cache.truncate(0)
    assert np.all(attention_with_kvcache(q[:, :, :1], cache) == 0)


class LikeLists(RuleBasedStateMachine):  # type: ignore[misc]
    """Caches of both kinds hold what lists of tokens would, whatever was appended and cut off."""

    def __init__(self):
        super().__init__()
        sizes = {"batch_size": 3, "max_length": 11, "heads": 1, "head_dim": 2}
        self.caches = [KVCache(**sizes), KVCache(**sizes, page_size=3, num_pages=8)]
        self.lists = [[] for _ in range(3)]
        self.token = 0

    @rule(counts=st.lists(st.integers(0, 5), min_size=3, max_size=3))
    def append(self, counts):
        x = np.arange(self.token, self.token + 3 * 5, dtype=np.float32).reshape(3, 1, 5, 1)
        self.token += x.size
        x = np.concatenate([x, -x], axis=-1)
        lengths = [len(a) + n for a, n in zip(self.lists, counts, strict=True)]
        fits = max(lengths) <= 11
        enough = sum(-(-n // 3) for n in lengths) <= 8
        for cache, allowed in zip(self.caches, (fits, fits and enough), strict=True):
            if allowed:
                cache.append(x, x + 0.5, counts)
            else:
                with pytest.raises(ValueError, match=r"^k: expected"):
                    cache.append(x, x + 0.5, counts)
        if fits and not enough:  # keep both the same
            self.caches[0].truncate([len(a) for a in self.lists])
        elif fits:
            for a, row, n in zip(self.lists, x[:, 0, :, 0], counts, strict=True):
                a.extend(row[:n])

    @rule(share=st.lists(st.floats(0, 1), min_size=3, max_size=3))
    def truncate(self, share):
        lengths = [int(len(a) * s) for a, s in zip(self.lists, share, strict=True)]
        for cache in self.caches:
            cache.truncate(lengths)
        self.lists = [a[:n] for a, n in zip(self.lists, lengths, strict=True)]

    @invariant()
    def same_tokens(self):
        for cache in self.caches:
            np.testing.assert_array_equal(cache.lengths, [len(a) for a in self.lists])
            k, v = cache.keys_and_values()
            for b, a in enumerate(self.lists):
                np.testing.assert_array_equal(k[b, 0, : len(a), 0], a)
                np.testing.assert_array_equal(v[b, 0, : len(a), 1], 0.5 - np.array(a))
        pages = self.caches[1].block_table
        used = pages[pages >= 0]
        assert len(set(used)) == used.size == sum(-(-len(a) // 3) for a in self.lists)


TestLikeLists = LikeLists.TestCase


def test_an_empty_cache():
    for kind in KINDS:
        out, lse = attention_with_kvcache(
            np.ones((B, H, 2, D), np.float32), make(kind), return_lse=True
        )
        assert np.all(out == 0)
        assert np.all(np.isneginf(lse))


def test_pages_are_taken_as_needed_and_given_back():
    cache = KVCache(2, 12, 1, 4, page_size=4, num_pages=4)
    x = np.ones((2, 1, 5, 4), np.float32)
    cache.append(x, x, [5, 4])
    table = cache.block_table
    assert table.shape == (2, 3)
    np.testing.assert_array_equal(table >= 0, [[True, True, False], [True, False, False]])
    assert len(set(table[table >= 0])) == 3
    cache.append(x[:, :, :4], x[:, :, :4], [3, 4])  # the second needs the last page
    with pytest.raises(ValueError, match="k: expected to need at most the 0 pages left, got 1"):
        cache.append(x[:, :, :1], x[:, :, :1], [1, 0])
    cache.truncate([8, 4])
    cache.append(x[:, :, :1], x[:, :, :1], [1, 0])
    np.testing.assert_array_equal(cache.lengths, [9, 4])
    used = cache.block_table[cache.block_table >= 0]
    assert len(set(used)) == len(used) == 4


def test_pages_may_be_shared():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 4, 1, 3, 4)).astype(np.float32)  # four pages of three tokens
    table = np.array([[2, 0, 99], [2, 1, -7]])  # a common beginning; the last entries are unused
    cache = KVCache.over(k, v, [5, 6], block_table=table)
    q = rng.standard_normal((2, 1, 1, 4)).astype(np.float32)
    out = attention_with_kvcache(q, cache)
    for b, n in enumerate((5, 6)):
        keys = (np.concatenate([x[2], x[table[b, 1]]], axis=1)[:, :n] for x in (k, v))
        np.testing.assert_array_equal(out[b], fusedattn.attention(q[b], *keys))


def test_over_writes_into_what_it_was_given():
    k, v = np.zeros((2, 1, 6, 4), np.float32), np.zeros((2, 1, 6, 3), np.float32)
    cache = KVCache.over(k, v, [2, 0])
    x = np.ones((2, 1, 3, 4), np.float32)
    cache.append(x, x[..., :3])
    np.testing.assert_array_equal(k[:, 0, :, 0], [[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(v[:, 0, :, 2], k[:, 0, :, 0])
    assert cache.k is k
    assert cache.block_table is None


def state(cache):
    return cache.lengths, cache.block_table, copy.copy(cache._free)


def assert_unchanged(cache, before):
    for x, y in zip(state(cache), before, strict=True):
        np.testing.assert_array_equal(x, y)


GOOD = {"q": (B, H, 2, D), "k": (B, HKV, 2, D), "v": (B, HKV, 2, DV)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": (B, HKV, 41, D), "v": (B, HKV, 41, DV)}, ValueError, "k: expected at most 35 .* 41"),
        ({"k": (B, HKV, 2, D + 1)}, ValueError, r"k: expected shape \(3, 2, S, 8\).*9\)"),
        ({"k": (B, HKV + 1, 2, D)}, ValueError, r"k: expected shape .*\(3, 3, 2, 8\)"),
        ({"k": (B, HKV, D)}, ValueError, r"k: expected shape .*\(3, 2, 8\)"),
        ({"v": (B, HKV, 3, DV)}, ValueError, r"v: expected shape .*\(3, 2, 3, 5\)"),
        ({"v": None}, ValueError, "v: expected k and v together"),
        ({"q": (B + 1, H, 2, D)}, ValueError, r"q: expected .* B = 3, got shape \(4, 4, 2, 8\)"),
        ({"q": (H, 2, D)}, ValueError, r"q: .*\(4, 2, 8\)"),
        ({"q": (B, H, 2, D + 1)}, ValueError, "k: .*D=9, got shape"),
        ({"q_lengths": [1, 2, 3]}, ValueError, "q_lengths: expected from 0 to 2 .* 2, got 3"),
        ({"q_lengths": [1, 2]}, ValueError, r"q_lengths: .*\(3,\), got \(2,\)"),
        ({"q_lengths": 1.5}, TypeError, "q_lengths: expected integers, got float64"),
        ({"q_offset": 1}, TypeError, "q_offset: not an argument"),
        ({"kv_lengths": 1}, TypeError, "kv_lengths: not an argument"),
        ({"layout": "bhds"}, ValueError, "layout: .*'bhds'"),
        ({"window": 3}, ValueError, "window"),
        ({"mask": np.ones((2, 99), bool)}, ValueError, r"mask: .*\(2, 99\)"),
    ],
)
def test_a_failed_call_leaves_the_cache_as_it_was(kind, changed, error, message):
    cache = make(kind)
    _, k, v = sequence(np.float32)
    cache.append(k[:, :, :5], v[:, :, :5], [5, 0, 1])
    before, storage = state(cache), (cache.k.copy(), cache.v.copy())
    arguments = GOOD | changed
    for name in ("q", "k", "v"):
        if arguments[name] is not None:
            arguments[name] = np.zeros(arguments[name], np.float32)
    with pytest.raises(error, match=message):
        attention_with_kvcache(cache=cache, **arguments)
    assert_unchanged(cache, before)
    if "over" in kind:  # the caller's arrays, down to what no sequence uses
        np.testing.assert_array_equal(cache.k, storage[0])
        np.testing.assert_array_equal(cache.v, storage[1])
    with pytest.raises(TypeError, match="k: expected float32 as the cache, got float64"):
        cache.append(k.astype(float), v.astype(float))
    with pytest.raises(ValueError, match="lengths: expected from 0 to 5 for sequence 0, got 6"):
        cache.truncate([6, 0, 0])
    assert_unchanged(cache, before)


def test_a_block_table_out_of_range():
    k, v = np.zeros((4, 1, 3, 4), np.float32), np.zeros((4, 1, 3, 4), np.float32)
    for entry in (4, -1):
        table = np.array([[0, 1], [2, entry]])
        with pytest.raises(ValueError, match=rf"block_table: .* 0 to 3, got {entry} at \(1, 1\)"):
            KVCache.over(k, v, [1, 4], block_table=table)
        cache = KVCache.over(k, v, [1, 2], block_table=table)
        x = np.ones((2, 1, 2, 4), np.float32)
        with pytest.raises(ValueError, match=rf"block_table: .* 0 to 3, got {entry} at \(1, 1\)"):
            cache.append(x, x)
        np.testing.assert_array_equal(cache.lengths, [1, 2])
        assert not k.any()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"heads": 1.0}, TypeError, r"heads: expected an integer, got 1\.0"),
        ({"page_size": True}, TypeError, "page_size: expected an integer, got True"),
        ({"num_pages": 3}, ValueError, "num_pages: expected None without page_size, got 3"),
        ({"dtype": np.int32}, TypeError, "dtype: expected .*bfloat16, got int32"),
        ({"layout": "sbhd"}, ValueError, "layout: expected .*'sbhd'"),
    ],
)
def test_wrong_sizes(changed, error, message):
    good = {"batch_size": 2, "max_length": 8, "heads": 1, "head_dim": 4}
    with pytest.raises(error, match=message):
        KVCache(**(good | changed))


X = np.zeros((2, 1, 6, 4), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.tolist(), X, 0), TypeError, "k: expected a NumPy array, got list"),
        ((X[0], X[0], 0), ValueError, r"k: expected 4 dimensions.*\(1, 6, 4\)"),
        ((X[:, :, :0], X, 0), ValueError, r"k: expected .*none 0.*\(2, 1, 0, 4\)"),
        ((X, X[:, :, :5], 0), ValueError, r"v: expected shape .*\(2, 1, 5, 4\)"),
        ((X, X.astype(float), 0), TypeError, "v: expected float32 as k, got float64"),
        ((X, X, 7), ValueError, "lengths: expected from 0 to 6 for sequence 0, got 7"),
        ((X, X, [1, -1]), ValueError, "lengths: .* sequence 1, got -1"),
        ((X, X, [0.5, 1]), TypeError, "lengths: expected integers, got float64"),
    ],
)
def test_what_over_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        KVCache.over(*arguments)


def test_a_block_table_of_another_kind():
    with pytest.raises(TypeError, match="block_table: expected integers, got float64"):
        KVCache.over(X, X, 0, block_table=[[0.0]])
    with pytest.raises(ValueError, match=r"block_table: expected shape \(B, M\), got \(1,\)"):
        KVCache.over(X, X, 0, block_table=[0])


def test_only_caches():
    with pytest.raises(TypeError, match="cache: expected a KVCache, got dict"):
        attention_with_kvcache(X, {})

"""The flash-attn package's functions, against their documentation by way of the oracle."""

import numpy as np
import pytest

import fusedattn
from fusedattn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
)

B, H, HKV, D = 2, 4, 2, 8
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


def arrays(sq=5, sk=9, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, sq, H, D), (B, sk, HKV, D), (B, sk, HKV, D)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def seen(sq, sk, causal=False, window_size=(-1, -1)):
    """What the documentation lets query i see, written out."""
    i, j = np.arange(sq)[:, None] + sk - sq, np.arange(sk)
    left, right = window_size
    mask = np.ones((sq, sk), bool)
    if causal:
        mask &= j <= i
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


@pytest.mark.parametrize(
    ("sq", "sk", "picture"),
    [(2, 5, ["11110", "11111"]), (5, 2, ["00", "00", "00", "10", "11"])],
)
def test_the_pictures_of_the_documentation(sq, sk, picture):
    q, k = np.zeros((1, sq, 1, sk), np.float32), np.zeros((1, sk, 1, sk), np.float32)
    weights = flash_attn_func(q, k, np.eye(sk, dtype=np.float32)[None, :, None], causal=True)
    rows = ["".join(str(int(w > 0)) for w in row) for row in weights[0, :, 0]]
    assert rows == picture


RULES = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (3, -1), "causal": True},
    {"softmax_scale": 0.3, "softcap": 1.5},
    {"alibi_slopes": np.array([0.5, 0.25, 0.125, 1.0], np.float32)},
    {"alibi_slopes": np.linspace(0.1, 0.9, 8, dtype=np.float32).reshape(2, 4), "causal": True},
]


def in_ours(sq, sk, rules):
    """The rules of one call for the oracle: masks written out, ALiBi as a bias."""
    mask = seen(sq, sk, rules.get("causal", False), rules.get("window_size", (-1, -1)))
    ours = {"mask": mask, "scale": rules.get("softmax_scale"), "softcap": rules.get("softcap", 0.0)}
    if "alibi_slopes" in rules:
        distance = abs(np.arange(sq)[:, None] + sk - sq - np.arange(sk))
        ours["bias"] = -rules["alibi_slopes"][..., None, None] * distance
    return ours


@pytest.mark.parametrize(("sq", "sk"), [(5, 9), (9, 5), (6, 6), (1, 7)])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_func(rules, sq, sk):
    q, k, v = arrays(sq, sk)
    out, lse, probabilities = flash_attn_func(q, k, v, **rules, return_attn_probs=True)
    expected, expected_lse = reference.attention(
        q, k, v, layout="bshd", return_lse=True, **in_ours(sq, sk, rules)
    )
    np.testing.assert_allclose(out, expected, **CLOSE)
    np.testing.assert_allclose(lse, expected_lse, **CLOSE)
    assert probabilities is None
    np.testing.assert_array_equal(flash_attn_func(q, k, v, **rules, deterministic=True), out)


CU_Q, CU_K = np.array([0, 3, 3, 9, 10], np.int32), np.array([0, 5, 6, 10, 10], np.int32)


def packed(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (CU_Q[-1], H, D), (CU_K[-1], HKV, D), (CU_K[-1], HKV, D)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("rules", RULES[:-1], ids=str)
def test_varlen_is_func_of_each_sequence(rules):
    q, k, v = packed()
    longest = int(np.diff(CU_Q).max()), int(np.diff(CU_K).max())
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, CU_Q, CU_K, *longest, **rules, return_attn_probs=True
    )
    assert lse.shape == (H, len(q))
    for n in range(4):
        i, j = slice(*CU_Q[n : n + 2]), slice(*CU_K[n : n + 2])
        alone = flash_attn_func(q[None, i], k[None, j], v[None, j], **rules)
        np.testing.assert_array_equal(out[i], alone[0])


def test_varlen_takes_slopes_of_each_sequence():
    q, k, v = packed()
    slopes = np.random.default_rng(1).random((4, H)).astype(np.float32)
    out = flash_attn_varlen_func(q, k, v, CU_Q, CU_K, alibi_slopes=slopes)
    for n in range(4):
        i, j = slice(*CU_Q[n : n + 2]), slice(*CU_K[n : n + 2])
        alone = flash_attn_func(q[None, i], k[None, j], v[None, j], alibi_slopes=slopes[n])
        np.testing.assert_array_equal(out[i], alone[0])


def test_varlen_from_pages():
    q, k, v = packed()
    size, lengths = 2, np.diff(CU_K)
    table = np.random.default_rng(2).permutation(14)[:12].reshape(4, 3).astype(np.int32)
    pages = np.full((2, 14, size, HKV, D), np.nan, np.float32)
    for n in range(4):
        for t in range(lengths[n]):
            row = CU_K[n] + t
            pages[:, table[n, t // size], t % size] = k[row], v[row]
    got = flash_attn_varlen_func(q, *pages, CU_Q, CU_K, causal=True, block_table=table)
    np.testing.assert_array_equal(got, flash_attn_varlen_func(q, k, v, CU_Q, CU_K, causal=True))
    table[0, 2] = 14
    with pytest.raises(ValueError, match="block_table: expected pages from 0 to 13, got 14"):
        flash_attn_varlen_func(q, *pages, CU_Q, CU_K, block_table=table)


@pytest.mark.parametrize("kind", ["contiguous", "rows", "pages"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_with_kvcache(kind, rules):
    rng = np.random.default_rng(0)
    lengths, new, room, size = np.array([4, 9]), 3, 12, 3
    q = rng.standard_normal((B, new, H, D)).astype(np.float32)
    k, v = rng.standard_normal((2, B, new, HKV, D)).astype(np.float32)
    caches = np.full((2, B, room, HKV, D), np.nan, np.float32)
    for b, n in enumerate(lengths):
        caches[:, b, :n] = rng.standard_normal((2, n, HKV, D))
    where, options = caches, {}
    if kind == "rows":
        where = np.full((2, 5, room, HKV, D), np.nan, np.float32)
        options["cache_batch_idx"] = np.array([3, 1], np.int32)
        where[:, [3, 1]] = caches
    elif kind == "pages":
        where = np.full((2, 9, size, HKV, D), np.nan, np.float32)
        options["block_table"] = np.array([[8, 0, 3, 5], [1, 7, 2, 6]], np.int32)
        where[:, options["block_table"]] = caches.reshape(2, B, room // size, size, HKV, D)
    out, lse = flash_attn_with_kvcache(
        q, *where, k, v, cache_seqlens=lengths, return_softmax_lse=True, **rules, **options
    )
    for b, n in enumerate(lengths):
        keys, values = (np.concatenate([caches[i, b, :n], x[b]]) for i, x in enumerate((k, v)))
        own = {**rules}
        if np.ndim(own.get("alibi_slopes", 0)) == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b]
        alone = flash_attn_func(q[None, b], keys[None], values[None], **own, return_attn_probs=True)
        np.testing.assert_array_equal(out[b], alone[0][0])
        np.testing.assert_array_equal(lse[b], alone[1][0])
    # The new tokens are in the cache: the same again, without them.
    again = flash_attn_with_kvcache(q, *where, cache_seqlens=lengths + new, **rules, **options)
    np.testing.assert_array_equal(again, out)


def test_with_kvcache_all_of_it_by_default():
    q, k, v = arrays(1, 9)
    expected = flash_attn_func(q, k, v)
    np.testing.assert_array_equal(flash_attn_with_kvcache(q, k, v), expected)
    pages = k.reshape(6, 3, HKV, D), v.reshape(6, 3, HKV, D)
    table = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(flash_attn_with_kvcache(q, *pages, block_table=table), expected)


def test_with_kvcache_padded_on_the_left():
    q, k, v = arrays(2, 9)
    pad, lengths = np.array([0, 4]), np.array([9, 7])
    k[1, :4] = v[1, :4] = k[1, 7:] = v[1, 7:] = np.nan
    out = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, cache_leftpad=pad, causal=True, window_size=(2, -1)
    )
    for b in range(B):
        keys = (x[None, b, pad[b] : lengths[b]] for x in (k, v))
        alone = flash_attn_func(q[None, b], *keys, causal=True, window_size=(2, -1))
        np.testing.assert_allclose(out[b], alone[0], **CLOSE)


@pytest.mark.parametrize("packed_form", [False, True])
def test_dropout(packed_form):
    q, k, v = arrays(6, 6)
    expected = fusedattn.attention(q, k, v, dropout_p=0.4, seed=3, layout="bshd")
    cu = np.array([0, 6, 12])
    rows = [x.reshape(12, -1, D) for x in (q, k, v)]

    def call(**options):
        if packed_form:
            return flash_attn_varlen_func(*rows, cu, cu, 6, 6, 0.4, **options).reshape(q.shape)
        return flash_attn_func(q, k, v, 0.4, **options)

    np.testing.assert_array_equal(call(seed=3), expected)
    assert not np.array_equal(call(), call())  # a fresh seed each time


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rotary_cos": np.ones(4)}, ValueError, "rotary_cos: expected None"),
        ({"rotary_sin": np.ones(4)}, ValueError, "rotary_sin: expected None"),
        ({"k": np.zeros((B, 1, HKV, D), np.float32)}, ValueError, "cache_seqlens: .*None"),
        ({"cache_seqlens": 10}, ValueError, "lengths: expected from 0 to 9.*10"),
        ({"cache_batch_idx": [0, 2]}, ValueError, "block_table: .* 0 to 1, got 2"),
        (
            {"cache_batch_idx": [0, 1], "block_table": [[0], [1]]},
            ValueError,
            "cache_batch_idx: expected None",
        ),
        ({"window_size": (1,)}, ValueError, "window"),
    ],
)
def test_errors(changed, error, message):
    q, k, v = arrays(1, 9)
    with pytest.raises(error, match=message):
        flash_attn_with_kvcache(q, k, v, **changed)


def test_errors_of_shapes_come_from_attention():
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"^q: expected"):
        flash_attn_func(q[0, 0, 0], k, v)
    with pytest.raises(ValueError, match=r"^cu_seqlens_k: expected"):
        flash_attn_varlen_func(*packed(), CU_Q, CU_K[[0, -1]], 6, 10)

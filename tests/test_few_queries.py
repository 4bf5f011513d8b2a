"""The kernel for few queries (group * Sq at most 8, on tiles 16): right, with the tiled bits."""

import itertools

import numpy as np
import pytest

import fusedattn
from tests.accuracy import assert_accurate, assert_same, fused, oracle
from tests.strategies import DTYPES, HALVES, MEMORY, in_memory, make
from tests.yardstick import Problem

# Query heads for a key head, queries; 9 (on tiles 17) in all is one too many for this kernel.
FEW = [(1, n) for n in range(1, 10)] + [(n, 1) for n in range(2, 10)]
FEW += [(2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (3, 3), (1, 16), (1, 17), (13, 1), (4, 4)]
# float32 and bfloat16 have code of their own; the types that share float32's take a third of them.
PAIRS = [
    (*pair, dtype)
    for n, pair in enumerate(FEW)
    for m, dtype in enumerate(DTYPES)
    if dtype in (np.float32, HALVES[1]) or n % 3 == m % 3
]
DIMS = (1, 16, 40, 64, 128)
KEYS = (1, 2, 15, 16, 17, 33, 127, 128, 129, 255, 256, 257, 300, 384, 385, 513)
RULES = ("none", "causal", "mask", "bias", "kv_lengths", "all")


def problem(group, sq, sk, d=16, dv=16, dtype=np.float32, rules=None, seed=0):
    h = {"h": 2 * group, "hkv": 2}
    return make(
        h | {"lead": (2,), "sq": sq, "sk": sk, "d": d, "dv": dv},
        dtype=dtype,
        rules=rules,
        seed=seed,
    )


def rules_of(name, p, seed=0):
    """Rules by name; the arrays have a row for every query."""
    rng = np.random.default_rng(seed)
    (b, h, sq), sk = p.q.shape[:3], p.k.shape[2]
    bias = rng.standard_normal((h, sq, sk)).astype(p.q.dtype)
    every = {
        "causal": {"is_causal": True, "q_offset": rng.integers(-1, sk, b)},
        "mask": {"mask": rng.random((b, 1, sq, sk)) < 0.6},
        "bias": {"bias": np.where(rng.random(bias.shape) < 0.2, p.q.dtype.type(-np.inf), bias)},
        "kv_lengths": {"kv_lengths": rng.integers(0, sk + 1, b)},
        "none": {},
    }
    if name != "all":
        return every[name]
    return {key: x for rule in every.values() for key, x in rule.items()}


def among_more(p, extra=17):
    """The same call with more queries behind, so many that the tiled kernel takes it."""
    rng = np.random.default_rng(1)

    def longer(x, axis):
        shape = list(x.shape)
        shape[axis] = extra
        new = rng.standard_normal(shape) if x.dtype != bool else rng.random(shape) < 0.5
        return np.concatenate([x, new.astype(x.dtype)], axis=axis)

    more = Problem(longer(p.q, 2), p.k, p.v, longer(p.dout, 2), dict(p.rules))
    for name in ("mask", "bias"):
        if name in more.rules:
            more.rules[name] = longer(more.rules[name], -2)
    return more


def assert_tiled_bits(p):
    sq = p.q.shape[2]
    got, tiled = fused(p, need=()), fused(among_more(p), need=())
    assert_same(got["out"], tiled["out"][:, :, :sq], "out")
    assert_same(got["lse"], tiled["lse"][:, :, :sq], "lse")


@pytest.mark.parametrize(("group", "sq", "dtype"), PAIRS)
def test_accuracy(isa, group, sq, dtype):
    for n, sk in enumerate(KEYS):
        if dtype != np.float32 and n % 4 != (group + sq) % 4:
            continue  # the other types share this code: a quarter of the lengths for each pair
        d, dv = DIMS[n % 5], DIMS[(n + group + sq) % 5]
        p = problem(group, sq, sk, d, dv, dtype, seed=n)
        p.rules = rules_of(RULES[(n + sq) % 6], p, seed=n)
        assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_keys(isa, dtype):
    for sk in range(1, 301):
        group, sq = FEW[sk % len(FEW)]
        p = problem(group, sq, sk, DIMS[sk % 5], DIMS[sk // 5 % 5], dtype, seed=sk)
        p.rules = rules_of(RULES[sk // 7 % 6], p, seed=sk)
        assert_tiled_bits(p)


@pytest.mark.parametrize(("group", "sq", "dtype"), PAIRS)
def test_bits_of_the_tiled_kernel(isa, group, sq, dtype):
    for n, rule in enumerate(RULES):
        for m, sk in enumerate(KEYS[(n + sq) % 4 :: 4]):
            d, dv = DIMS[(n + m) % 5], DIMS[(n + 2 * m + sq) % 5]
            p = problem(group, sq, sk, d, dv, dtype, seed=m)
            p.rules = rules_of(rule, p, seed=n)
            assert_tiled_bits(p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_dims(isa, dtype):
    for d in DIMS:
        for dv in DIMS:
            p = problem(2, 3, 150, d, dv, dtype)
            assert_tiled_bits(p)
            assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", MEMORY)
def test_memory(isa, how, dtype):
    for at in ("q", "k", "v"):
        p = problem(2, 2, 200, 40, 24, dtype)
        p.rules = rules_of("all", p)
        setattr(p, at, in_memory(getattr(p, at), how))
        assert_tiled_bits(p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_alone_or_in_its_group(isa, dtype):
    p = problem(4, 2, 300, 64, 64, dtype)
    whole = fusedattn.attention(p.q, p.k, p.v)
    for h in range(8):
        kv = slice(h // 4, h // 4 + 1)
        got = fusedattn.attention(p.q[:, h : h + 1], p.k[:, kv], p.v[:, kv])
        np.testing.assert_array_equal(got, whole[:, h : h + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("victim", ["q", "k", "v"])
def test_junk(isa, victim, junk, dtype):
    rng = np.random.default_rng(0)
    for rule, sk in itertools.product(RULES, (1, 16, 40, 257)):
        p = problem(2, 3, sk, 5, 7, dtype, seed=sk)
        p.rules = rules_of(rule, p, seed=sk)
        x = getattr(p, victim)
        x[0, 0, rng.integers(x.shape[2]), rng.integers(x.shape[3])] = junk
        assert_tiled_bits(p)
        exact = oracle(p)
        for name, got in fused(p, need=()).items():
            got, want = got.astype(np.float64), exact[name]
            np.testing.assert_array_equal(np.isnan(got), np.isnan(want), name)
            np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want), name)
            np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_junk_reaches_nothing(isa, dtype):
    for group, sq in ((1, 1), (2, 3), (8, 1)):
        clean, dirty = (problem(group, sq, 200, 16, 24, dtype) for _ in range(2))
        unseen = np.arange(200) % 3 == 0
        for p in (clean, dirty):
            p.rules = {"mask": ~unseen, "kv_lengths": np.array([150, 7])}
        for junk in (np.nan, np.inf, -np.inf):
            dirty.k[:, :, unseen] = dirty.v[:, :, unseen] = junk
            dirty.k[0, :, 150:] = dirty.v[0, :, 150:] = junk
            dirty.k[1, :, 7:] = dirty.v[1, :, 7:] = junk
            expected = fused(clean, need=())
            for name, x in fused(dirty, need=()).items():
                assert_same(x, expected[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "sq"), [(1, 1), (2, 4), (4, 1)])
def test_threads(isa, group, sq, dtype):
    p = problem(group, sq, 3000, 64, 64, dtype)
    expected = fusedattn.attention(p.q, p.k, p.v, num_threads=1)
    for num_threads in (2, 3, 8):
        got = fusedattn.attention(p.q, p.k, p.v, num_threads=num_threads)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_with_longer_sequences(isa, dtype):
    # Some sequences take this kernel and some the tiled one, in one call.
    cu_q, cu_k = np.array([0, 1, 41, 44, 44, 52]), np.array([0, 300, 340, 341, 400, 530])
    rng = np.random.default_rng(0)
    shapes = (52, 2, 24), (530, 2, 24), (530, 2, 16)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    out = fusedattn.attention_varlen(q, k, v, cu_q, cu_k)
    for n in range(5):
        i, j = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        alone = fusedattn.attention(q[None, i], k[None, j], v[None, j], layout="bshd")[0]
        np.testing.assert_array_equal(out[i], alone)


JUMPS = [
    (0, 40.0),
    (31, 5.4),
    (32, 5.7),
    (64, -40.0),
    (127, 5.7),
    (128, 20.0),
    (200, 5.4),
    (290, 90.0),
]


@pytest.mark.parametrize("by", ["keys", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "jump"), JUMPS)
def test_logits_that_jump(isa, by, dtype, key, jump):
    """Larger logits late: what was summed up before has to follow, for the queries concerned."""
    p = problem(1, 5, 300, dtype=dtype)
    if by == "keys":  # of the first dimension, at queries 1 and 3
        p.q[..., 0] = [0, 4, 0, -4, 0]
        p.k[..., key:, 0] = jump
    else:
        bias = np.zeros((2, 5, 300))
        bias[0, 1:4, key:] = jump
        p.rules["bias"] = bias.astype(dtype)
    assert_accurate(fused(p), p)
    assert_tiled_bits(p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_keys_that_some_queries_see_late(isa, dtype):
    p = problem(1, 6, 300, dtype=dtype)
    first = np.array([0, 31, 32, 33, 128, 299])
    p.rules["mask"] = np.arange(300) >= first[:, None]
    p.rules["bias"] = (np.arange(300) / 7).astype(dtype)[None]
    assert_accurate(fused(p), p)
    p.rules["bias"] = np.broadcast_to(p.rules["bias"], (2, 6, 300)).copy()
    p.rules["mask"] = p.rules["mask"][None, None]
    assert_tiled_bits(p)


@pytest.mark.parametrize("slope", [1e30, 1e33, 1e36])
def test_slopes_that_leave_the_range_of_float32(isa, slope):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 64, 64), dtype=np.float32) for _ in range(3))
    rules = {"alibi_slopes": np.array([slope], np.float32), "return_lse": True}
    many = fusedattn.attention(q, k, v, q_offset=100_000, **rules)
    one = fusedattn.attention(q[:, :, 40:41], k, v, q_offset=100_040, **rules)
    for all_rows, row in zip(many, one, strict=True):
        np.testing.assert_array_equal(all_rows[:, :, 40:41], row)

"""Promise 1: what is allowed propagates, what is masked never arrives, blind queries get zeros."""

import numpy as np
import pytest
from ml_dtypes import finfo

import fusedattn
from fusedattn import reference
from tests.accuracy import assert_same, fused, oracle
from tests.strategies import DTYPES, HALVES, make
from tests.yardstick import compute_type

JUNK = (np.nan, np.inf, -np.inf)
LENGTHS = range(1, 65)
SQ, D, DV = 6, 3, 5


def problem(sk, sq=SQ, dtype=np.float32, **rules):
    sizes = {"lead": (2,), "h": 2, "hkv": 1, "sq": sq, "sk": sk, "d": D, "dv": DV}
    return make(sizes, rules=rules, dtype=dtype, seed=sk)


def lengths(isa, name, dtype, turn):
    """Every length for some rules and types; for those that share their code a part, by turns."""
    if isa != fusedattn.cpu_info()["isas"][-1]:
        return LENGTHS[(turn + RULES.index(name)) % 7 :: 7]
    everything = name in ("none", "mask", "all") and dtype in (np.float32, HALVES[1])
    return LENGTHS if everything else LENGTHS[turn % 3 :: 3]


def rules_of(name, sk, dtype=np.float32):
    rng = np.random.default_rng(sk)
    rules = {
        "none": {},
        "causal": {"is_causal": True, "q_offset": sk // 2 - 1},
        "kv_lengths": {"kv_lengths": np.array([sk // 2, sk])},
        "mask": {"mask": rng.random((2, 1, SQ, sk)) < 0.5},
        "bias": {"bias": np.where(rng.random((2, SQ, sk)) < 0.5, -np.inf, 0.5).astype(dtype)},
        "window": {"window": (sk // 3, 2), "q_offset": sk // 2 - 1},
        "q_lengths": {"q_lengths": np.array([SQ // 2, SQ])},
        "segments": {"segment_ids": (rng.integers(0, 3, (2, SQ)), rng.integers(0, 3, (2, sk)))},
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": np.array([0.5, 0.25]), "q_offset": sk // 2},
        "sinks": {"sinks": np.array([0.3, -0.2], np.float32)},
        "dropout": {"dropout_p": 0.4, "seed": sk},
    }
    if name == "all":
        every = {key: value for rule in rules.values() for key, value in rule.items()}
        return every | {"window": (sk // 2, sk // 2), "is_causal": False}
    return rules[name]


RULES = (
    "none",
    "causal",
    "kv_lengths",
    "mask",
    "bias",
    "window",
    "q_lengths",
    "segments",
    "softcap",
    "alibi",
    "sinks",
    "dropout",
    "all",
)
MASKING = tuple(
    name for name in RULES if name not in ("none", "softcap", "alibi", "sinks", "dropout")
)


def assert_same_kind(got, exact):
    """NaN where the oracle has NaN, infinities likewise, and about the same numbers elsewhere."""
    for name, x in got.items():
        # Two units in the last place of a 16-bit type, where that is more.
        rtol, atol = (max(tol, 2 * float(finfo(x.dtype).eps)) for tol in (2e-4, 2e-5))
        x = x.astype(np.float64)
        np.testing.assert_allclose(x, exact[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("victim", ["q", "k", "v", "bias"])
def test_allowed_junk_reaches_what_it_should(isa, name, victim, junk, dtype):
    rng = np.random.default_rng(0)
    for sk in lengths(isa, name, dtype, JUNK.index(junk)):
        p = problem(sk, dtype=dtype, **rules_of(name, sk, dtype))
        if victim == "bias":
            if junk < 0:
                continue  # a mask, not junk
            bias = p.rules.get("bias", np.zeros((1, 1, SQ, sk), dtype)).copy()
            bias[..., rng.integers(SQ), rng.integers(sk)] = junk
            p.rules["bias"] = bias
        else:
            x = getattr(p, victim)
            x[0, 0, rng.integers(x.shape[2]), rng.integers(x.shape[3])] = junk
        assert_same_kind(fused(p, need=()), oracle(p))


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("victim", ["q", "k", "v", "dout"])
def test_allowed_nan_reaches_the_gradients_it_should(isa, name, victim, dtype):
    rng = np.random.default_rng(0)
    for sk in lengths(isa, name, dtype, "qkv".find(victim)):
        p = problem(sk, dtype=dtype, **rules_of(name, sk, dtype))
        x = getattr(p, victim)
        x[0, 0, rng.integers(x.shape[2]), rng.integers(x.shape[3])] = np.nan
        got = fused(p)
        # A 16-bit output is rounded by so much that gradients are compared from there on.
        saved = got["out"] if dtype in HALVES else None
        assert_same_kind(got, oracle(p, saved))


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("junk", [np.inf, -np.inf])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("victim", ["q", "k", "v", "dout"])
def test_allowed_infinity_reaches_the_gradients_it_should(isa, name, victim, junk, dtype):
    rng = np.random.default_rng(1)
    for sk in lengths(isa, name, dtype, "qkv".find(victim))[::5]:
        p = problem(sk, dtype=dtype, **rules_of(name, sk, dtype))
        x = getattr(p, victim)
        x[0, 0, rng.integers(x.shape[2]), rng.integers(x.shape[3])] = junk
        got = fused(p)
        exact = oracle(p, got["out"] if dtype in HALVES else None)
        # An infinity cannot be cut for tiles: a gradient that is one may come as NaN.
        for name_of, y in got.items() if fusedattn.cpu_info()["isa"] == "amx" else ():
            cut = np.isnan(y) & np.isinf(exact[name_of])
            got[name_of] = np.where(cut, exact[name_of].astype(y.dtype), y)
        assert_same_kind(got, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("junk", [*JUNK, "largest"])
@pytest.mark.parametrize("name", MASKING)
def test_masked_junk_reaches_nothing(isa, name, junk, dtype):
    turn = len(str(junk)) + RULES.index(name)
    junk = finfo(dtype).max if junk == "largest" else junk
    for sk in lengths(isa, name, dtype, turn):
        rules = rules_of(name, sk, dtype)
        clean, dirty = problem(sk, dtype=dtype, **rules), problem(sk, dtype=dtype, **rules)
        logits = reference.logits(clean.q, clean.k, **rules)
        seen = ~np.isneginf(logits)
        blind, unseen = ~seen.any(axis=-1), ~seen.any(axis=(1, 2))[:, None]
        clean.dlse = np.ones(blind.shape, compute_type(dtype))
        dirty.dlse = np.where(blind, junk, clean.dlse).astype(clean.dlse.dtype)
        expected = fused(clean)
        dirty.k[unseen] = dirty.v[unseen] = junk
        dirty.q[blind] = dirty.dout[blind] = junk
        for name_of, x in fused(dirty).items():
            assert_same(x, expected[name_of], name_of)


@pytest.mark.parametrize("junk", JUNK)
def test_junk_seen_by_some_queries_stays_with_them(isa, junk):
    # Key 3 is masked for the queries of one half: within every tile, some see it and some do not.
    for sk in range(4, 65, 3):
        mask = np.ones((SQ, sk), bool)
        mask[::2, 3] = False
        clean, dirty = problem(sk, mask=mask), problem(sk, mask=mask)
        dirty.k[:, :, 3] = dirty.v[:, :, 3] = junk
        expected, got = fused(clean), fused(dirty)
        for name in ("out", "lse", "dq"):
            np.testing.assert_array_equal(got[name][:, :, ::2], expected[name][:, :, ::2], name)
        assert not np.isfinite(got["out"][:, :, 1::2]).any()
        # Likewise the queries: what the even ones give to keys is not touched by ...
        dirty = problem(sk, mask=~mask)
        dirty.q[:, :, 1::2] = dirty.dout[:, :, 1::2] = junk
        clean = problem(sk, mask=~mask)
        expected, got = fused(clean), fused(dirty)
        others = np.arange(sk) != 3
        np.testing.assert_array_equal(got["dk"][:, :, others], expected["dk"][:, :, others])
        np.testing.assert_array_equal(got["dv"][:, :, others], expected["dv"][:, :, others])


def test_logits_of_minus_infinity_from_allowed_keys(isa):
    # Such keys weigh nothing beside others, even where they fill the first tiles; alone they are
    # 0 / 0, which is not a number.
    for sk, last in ((9, 5), (70, 64), (300, 257), (300, 299), (600, 512)):
        p = problem(sk)
        p.q[..., 0] = np.abs(p.q[..., 0]) + 1
        p.k[:, :, :last, 0] = -np.inf
        got, exact = fused(p, need=()), oracle(p)
        assert np.isfinite(exact["out"]).all()
        assert_same_kind(got, exact)
        p.k[..., 0] = -np.inf
        got, exact = fused(p, need=()), oracle(p)
        assert np.isnan(exact["out"]).all()
        assert_same_kind(got, exact)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", [name for name in MASKING if name != "bias"])
def test_junk_at_a_masked_pair_of_the_bias(isa, name, junk):
    for sk in lengths(isa, name, np.float32, JUNK.index(junk)):
        rules = rules_of(name, sk)
        bias = rules.pop("bias", np.random.default_rng(sk).standard_normal((SQ, sk)))
        clean = problem(sk, **rules)
        masked = np.isneginf(reference.logits(clean.q, clean.k, **rules))
        dirty = problem(sk, **rules)
        clean.rules["bias"] = np.where(masked, 0, bias).astype(np.float32)
        dirty.rules["bias"] = np.where(masked, junk, bias).astype(np.float32)
        expected = fused(clean)
        for name_of, x in fused(dirty).items():
            assert_same(x, expected[name_of], name_of)


@pytest.mark.parametrize("junk", JUNK)
def test_logits_of_junk_under_a_bias_that_masks(isa, junk):
    # -inf + inf and -inf + NaN are masked all the same.
    for sk in LENGTHS:
        bias = np.zeros((sk,), np.float32)
        bias[sk // 2 :] = -np.inf
        clean, dirty = problem(sk, bias=bias), problem(sk, bias=bias)
        dirty.k[:, :, sk // 2 :] = dirty.v[:, :, sk // 2 :] = junk
        expected, got = fused(clean), fused(dirty)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], name)


@pytest.mark.parametrize(
    "rules",
    [
        {"mask": np.zeros((1, 1), bool)},
        {"bias": np.full((1,), -np.inf, np.float32)},
        {"is_causal": True, "q_offset": -100},
        {"kv_lengths": np.zeros(2, int)},
    ],
)
def test_blind_queries_get_zeros(isa, rules):
    for sk in (1, 5, 17, 64):
        p = problem(sk, **rules)
        for x in (p.q, p.k, p.v, p.dout):
            x[...] = np.nan
        got = fused(p)
        assert np.all(np.isneginf(got["lse"]))
        for name in ("out", "dq", "dk", "dv"):
            assert np.all(got[name] == 0), name


def test_garbage_left_in_memory_by_earlier_calls_reaches_nothing(isa):
    # Scratch is reused between calls: a call of NaN first, then every length again.
    for sk in LENGTHS:
        expected = fused(problem(sk, is_causal=True))
        spoiler = problem(64, sq=64)
        for x in (spoiler.q, spoiler.k, spoiler.v, spoiler.dout):
            x[...] = np.nan
        fused(spoiler)
        for name, x in fused(problem(sk, is_causal=True)).items():
            np.testing.assert_array_equal(x, expected[name], name)


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("victim", ["q", "k", "v", "dout"])
def test_junk_beyond_the_first_blocks(isa, victim, dtype):
    sizes = {"lead": (1,), "h": 2, "hkv": 1, "sq": 150, "sk": 300, "d": 40, "dv": 36}
    queries, keys = [3, 131, 149], [5, 257, 299]
    mask = np.random.default_rng(0).random((150, 300)) < 0.5
    clean, dirty, seen = (
        make(sizes, rules={"mask": mask.copy()}, dtype=dtype, seed=0) for _ in range(3)
    )
    for p in (clean, dirty):  # those of the junk are masked; `seen` has junk that is not
        if victim in ("k", "v"):
            p.rules["mask"][:, keys] = False
        else:
            p.rules["mask"][queries] = False
    rows = keys if victim in ("k", "v") else queries
    getattr(dirty, victim)[:, :, rows] = np.nan
    getattr(seen, victim)[0, 0, rows, [39, 0, 20] if victim in ("q", "k") else 7] = np.nan
    expected = fused(clean)
    for name, x in fused(dirty).items():
        assert_same(x, expected[name], name)
    got = fused(seen)
    exact = oracle(seen, got["out"] if dtype in HALVES else None)
    for name, x in got.items():
        np.testing.assert_array_equal(np.isnan(x.astype(np.float64)), np.isnan(exact[name]), name)

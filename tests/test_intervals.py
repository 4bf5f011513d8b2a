"""Windows and padded queries: against the oracle, with what they skip, and what they refuse."""

import itertools

import numpy as np
import pytest

import fusedattn
from tests.accuracy import assert_accurate, fused
from tests.strategies import DTYPES
from tests.yardstick import Problem

RULES = [
    {"window": (0, 0)},
    {"window": (3, 2)},
    {"window": (16, -1)},
    {"window": (-1, 5)},
    {"window": (-1, -1)},
    {"window": (63, 64)},
    {"window": (7, 100), "is_causal": True},
    {"window": (5, 1), "q_offset": np.array([60, -20])},
    {"window": (300, 300)},
    {"q_lengths": np.array([0, 37])},
    {"q_lengths": 1},
    {"q_lengths": np.array([130, 64]), "kv_lengths": np.array([9, 130]), "window": (20, 20)},
    {"q_lengths": np.array([5, 100]), "is_causal": True},
]


def problem(rules, dtype, sq, sk, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, 4, sq, 24), (2, 2, sk, 24), (2, 2, sk, 17), (2, 4, sq, 17)
    q, k, v, dout = (rng.standard_normal(s).astype(dtype) for s in shapes)
    return Problem(q, k, v, dout, rules)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_against_the_oracle(isa, rules, dtype):
    p = problem(rules, dtype, 130, 130)
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("sq", [1, 3])
@pytest.mark.parametrize("left", [0, 5, 127, 128, 200])
def test_a_few_queries_at_the_end(isa, sq, left):
    """Decoding with a window: queries sit at the end of the keys."""
    rules = {"window": (left, 0), "q_offset": 300 - sq}
    p = problem(rules, np.float32, sq, 300)
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_keys_has_the_bits_of_the_same_for_every_pair(isa, dtype, is_causal):
    """Keys hidden at the ends of a block are left out, those between are not; junk stays unseen."""
    j = np.arange(300)
    keys = np.stack([j < 137, j >= 141, (j < 30) | (j > 290), j % 3 == 0, (j >= 250) & (j < 259)])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((5, 2, n, 40)).astype(dtype) for n in (150, 300, 300))
    for x in (k, v):
        x[np.broadcast_to(~keys[:, None], (5, 2, 300))] = np.nan
    rules = {"is_causal": is_causal, "return_lse": True}
    out, lse = fusedattn.attention(q, k, v, mask=keys[:, None, None], **rules)
    pairs = np.repeat(keys[:, None, None], 150, axis=2)
    same, same_lse = fusedattn.attention(q, k, v, mask=pairs, **rules)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(lse, same_lse)
    assert np.isfinite(out.astype(np.float64)).all()
    if is_causal:
        assert not out[4].any()
        assert np.isneginf(lse[4]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_within_documents_has_the_bits_of_one_mask(isa, dtype):
    """A document's first key lies anywhere in a block; one query's keys are all hidden."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 230, 40)).astype(dtype) for _ in range(3))
    ids = np.repeat(np.arange(3), [40, 160, 30])
    mask = rng.random((230, 230)) < 0.6
    mask[77] = False
    rules = {"return_lse": True}
    out, lse = fusedattn.attention(q, k, v, mask=mask, segment_ids=ids[None], **rules)
    both = mask & (ids[:, None] == ids)
    same, same_lse = fusedattn.attention(q, k, v, mask=both, **rules)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(lse, same_lse)
    assert not out[:, :, 77].any()
    assert np.isneginf(lse[:, :, 77]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_as_the_mask_that_means_the_same(isa, threads):
    p = problem({}, np.float32, 200, 200)
    i, j = np.arange(200)[:, None], np.arange(200)
    means = (j >= i - 30) & (j <= i + 4)
    options = {"num_threads": threads}
    out, lse = fusedattn.attention(p.q, p.k, p.v, window=(30, 4), return_lse=True, **options)
    same, same_lse = fusedattn.attention(p.q, p.k, p.v, mask=means, return_lse=True, **options)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(lse, same_lse)
    a = fusedattn.attention_backward(p.dout, p.q, p.k, p.v, out, lse, window=(30, 4), **options)
    b = fusedattn.attention_backward(p.dout, p.q, p.k, p.v, out, lse, mask=means, **options)
    for x, y in zip(a[:3], b[:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_padded_queries_reach_nothing(isa):
    """NaN in padded rows of q and dout; out 0, LSE -inf, gradients 0 there, others untouched."""
    p = problem({}, np.float32, 70, 70)
    lengths = np.array([10, 66])
    results = []
    for junk in (0.0, np.nan, np.inf):
        q, dout = p.q.copy(), p.dout.copy()
        for b, n in enumerate(lengths):
            q[b, :, n:], dout[b, :, n:] = junk, junk
        out, vjp = fusedattn.attention_vjp(q, p.k, p.v, q_lengths=lengths)
        grads = vjp(dout)
        for b, n in enumerate(lengths):
            assert not out[b, :, n:].any()
            assert not grads.dq[b, :, n:].any()
        results.append((out, *grads[:3]))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("window", [(2, 3), (-1, 0)])
def test_packed(isa, window):
    cu = np.array([0, 5, 75, 75, 200])
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 200, 2, 16)).astype(np.float32)
    out = fusedattn.attention_varlen(q, k, v, cu, cu, window=window)
    for a, b in itertools.pairwise(cu):
        alone = fusedattn.attention(q[a:b], k[a:b], v[a:b], window=window, layout="bshd")
        np.testing.assert_array_equal(out[a:b], alone)


@pytest.mark.parametrize(
    ("option", "error", "came"),
    [
        ({"window": 3}, ValueError, "3"),
        ({"window": (1, 2, 3)}, ValueError, r"\(1, 2, 3\)"),
        ({"window": (-2, 0)}, ValueError, r"\(-2, 0\)"),
        ({"window": (0.5, 0)}, TypeError, r"\(0.5, 0\)"),
        ({"window": "ab"}, ValueError, "'ab'"),
        ({"q_lengths": 6}, ValueError, "6"),
        ({"q_lengths": -1}, ValueError, "-1"),
        ({"q_lengths": np.array([1.0, 2.0])}, TypeError, "float64"),
        ({"q_lengths": np.array([1, 2, 3])}, ValueError, r"\(3,\)"),
    ],
    ids=str,
)
def test_refused_by_name(option, error, came):
    x = np.zeros((2, 1, 5, 4), np.float32)
    (name,) = option
    with pytest.raises(error, match=rf"^{name}: expected .*, got .*{came}"):
        fusedattn.attention(x, x, x, **option)


def test_an_end_beyond_64_bits():
    p = problem({}, np.float32, 30, 40)
    everything = fusedattn.attention(p.q, p.k, p.v)
    for window in ((2**70, 2**70), (2**63, -1), (2**62, 2**64)):
        np.testing.assert_array_equal(fusedattn.attention(p.q, p.k, p.v, window=window), everything)
    with pytest.raises(ValueError, match=r"^window: expected .*, got "):
        fusedattn.attention(p.q, p.k, p.v, window=(-(2**70), 0))

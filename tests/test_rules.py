"""Rules, layouts, strides and dtypes in any combination, forward and backward."""

import numpy as np
import pytest
from hypothesis import given

import fusedattn
from tests.accuracy import assert_accurate, fused
from tests.strategies import DTYPES, MEMORY, in_memory, make, problems

SIZES = {"lead": (2,), "h": 4, "hkv": 2, "sq": 21, "sk": 39, "d": 10, "dv": 7}


@given(problem=problems())
def test_any_problem(isa, problem):
    assert_accurate(fused(problem), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("how", MEMORY)
def test_memory(isa, dtype, layout, how):
    for at in range(4):
        memory = tuple(how if i == at else "contiguous" for i in range(4))
        p = make(SIZES, layout=layout, dtype=dtype, memory=memory, rules={"is_causal": True})
        assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [None, (), (1,), (3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_leading_dimensions(isa, dtype, lead, layout):
    heads = {"h": 1, "hkv": 1} if lead is None else {"h": 4, "hkv": 2}
    p = make(
        SIZES | heads | {"lead": lead},
        layout=layout,
        dtype=dtype,
        rules={"q_offset": 3, "is_causal": True},
    )
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_what_each_sample_has_comes_with_its_leading_dimensions_or_flat(lead):
    rng, samples = np.random.default_rng(0), int(np.prod(lead))
    rules = {
        "q_offset": rng.integers(0, 3, lead),
        "q_lengths": rng.integers(0, 22, lead),
        "kv_lengths": rng.integers(0, 40, lead),
        "alibi_slopes": rng.random((*lead, 4)),
        "segment_ids": tuple(rng.integers(0, 3, (*lead, n)) for n in (21, 39)),
    }
    flat = {name: np.reshape(rules[name], samples) for name in list(rules)[:3]}
    flat["alibi_slopes"] = rules["alibi_slopes"].reshape(samples, 4)
    flat["segment_ids"] = tuple(x.reshape(samples, -1) for x in rules["segment_ids"])
    p, same = (make(SIZES | {"lead": lead}, rules=r) for r in (rules, flat))
    expected, got = fused(p), fused(same)
    assert_accurate(expected, p)
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x)


@pytest.mark.parametrize(("h", "hkv"), [(1, 1), (2, 1), (6, 3), (6, 2), (8, 1), (5, 5)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_grouped_heads(isa, h, hkv, layout):
    p = make(SIZES | {"h": h, "hkv": hkv}, layout=layout)
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", range(5))
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_every_way_to_broadcast(isa, dtype, rank, kind):
    rng = np.random.default_rng(rank)
    for ones in range(2**rank):
        logits = (2, 4, 21, 39)[4 - rank :]
        shape = tuple(1 if ones >> n & 1 else size for n, size in enumerate(logits))
        for layout in ("bhsd", "bshd"):
            p = make(SIZES, layout=layout, dtype=dtype)
            mask, bias = rng.random(shape) < 0.7, rng.standard_normal(shape).astype(dtype)
            p.rules[kind] = mask if kind == "mask" else bias
            assert_accurate(fused(p), p)


@pytest.mark.parametrize("how", MEMORY)
def test_memory_of_masks_and_biases(isa, how):
    rng = np.random.default_rng(0)
    p = make(SIZES)
    p.rules["mask"] = in_memory(rng.random((2, 1, 21, 39)) < 0.7, how)
    p.rules["bias"] = in_memory(rng.standard_normal((4, 21, 39)).astype(np.float32), how)
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("offset", [0, 18, 1, -1, -20, -21, 38, 39, 1000, 2**40, -(2**40)])
def test_q_offset(isa, offset):
    p = make(SIZES, rules={"is_causal": True, "q_offset": offset})
    assert_accurate(fused(p), p)
    p.rules["q_offset"] = np.array([offset, 5])
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_kv_lengths(isa, integer):
    for length in range(40):
        p = make(SIZES, rules={"kv_lengths": np.array([length, 39 - length], integer)})
        assert_accurate(fused(p), p)


def test_blocks_of_keys_and_queries_that_see_nothing(isa):
    # Whole tiles masked, at the beginning, in the middle and at the end.
    p = make(SIZES | {"sq": 200, "sk": 300})
    mask = np.ones((200, 300), bool)
    mask[:, :70] = mask[:, 130:190] = mask[:, 260:] = False
    mask[60:130] = False
    p.rules["mask"] = mask
    assert_accurate(fused(p), p)
    p.rules["bias"] = np.where(mask, np.float32(0.5), np.float32(-np.inf))
    del p.rules["mask"]
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", [{}, {"is_causal": True, "q_offset": 150}, {"window": (70, 90)}])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_mask_of_blocks_that_heads_share(isa, dtype, rules, lead):
    rng, sq, sk = np.random.default_rng(0), 150, 300
    blocks = rng.choice([0.0, 0.5, 1.0], (*lead, 1, -(-sq // 16), -(-sk // 128)))
    chances = blocks.repeat(16, -2).repeat(128, -1)[..., :sq, :sk]
    mask = rng.random(chances.shape) < chances
    sizes = SIZES | {"lead": lead, "sq": sq, "sk": sk}
    own = np.broadcast_to(mask, (*lead, 4, sq, sk)).copy()
    shared, each = (make(sizes, dtype=dtype, rules=rules | {"mask": m}) for m in (mask, own))
    got = fused(shared)
    assert_accurate(got, shared)
    for name, x in fused(each).items():
        np.testing.assert_array_equal(got[name], x)


@pytest.mark.parametrize("need", [("q",), ("k",), ("v",), ("q", "v"), ("k", "v"), ("q", "k"), ()])
def test_only_what_is_needed(isa, need):
    p = make(SIZES, rules={"is_causal": True})
    whole = fused(p)
    out, lse = whole["out"], whole["lse"]
    grads = fusedattn.attention_backward(p.dout, p.q, p.k, p.v, out, lse, need=need, **p.options)
    for name in ("q", "k", "v"):
        got = getattr(grads, f"d{name}")
        if name in need:
            np.testing.assert_array_equal(got, whole[f"d{name}"])
        else:
            assert got is None
    assert grads.dbias is None
    assert grads.dsinks is None


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "how", ["contiguous", "transposed", "reversed", "sliced", "field", "padded"]
)
def test_out_in_any_memory(isa, layout, how):
    p = make(SIZES, layout=layout)
    whole = fused(p, need=())
    buffer = in_memory(np.full(whole["out"].shape, np.nan, np.float32), how)
    out = fusedattn.attention(p.q, p.k, p.v, out=buffer, **p.options)
    assert out is buffer
    np.testing.assert_array_equal(out, whole["out"])


def test_out_at_any_address(isa):
    p = make(SIZES)
    whole = fused(p, need=())
    out = np.frombuffer(bytearray(whole["out"].nbytes + 1), np.float32, offset=1)
    out = out.reshape(whole["out"].shape)
    np.testing.assert_array_equal(fusedattn.attention(p.q, p.k, p.v, out=out), whole["out"])
    np.testing.assert_array_equal(out, whole["out"])


def test_vjp_is_backward(isa):
    p = make(SIZES, rules={"is_causal": True})
    whole = fused(p)
    out, vjp = fusedattn.attention_vjp(p.q, p.k, p.v, **p.options)
    np.testing.assert_array_equal(out, whole["out"])
    for _ in range(2):
        for name, got in zip(("dq", "dk", "dv"), vjp(p.dout)[:3], strict=True):
            np.testing.assert_array_equal(got, whole[name])


def test_results_are_as_documented(isa):
    p = make(SIZES, layout="bshd")
    out = fusedattn.attention(p.q, p.k, p.v, layout="bshd")
    assert isinstance(out, np.ndarray)
    assert out.flags.c_contiguous
    assert out.dtype == np.float32
    assert out.shape == (2, 21, 4, 7)
    out, lse = fusedattn.attention(p.q, p.k, p.v, layout="bshd", return_lse=True)
    assert lse.shape == (2, 4, 21)
    assert lse.dtype == np.float32


def test_arguments_are_left_alone(isa):
    p = make(SIZES, rules={"is_causal": True})
    arrays = (p.q, p.k, p.v, p.dout)
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    fused(p)
    for x, was in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, was)

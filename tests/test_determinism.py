"""Promise 4: for one instruction set the same bits, whatever the threads and the company."""

import itertools

import numpy as np
import pytest

import fusedattn
from tests.accuracy import fused
from tests.strategies import DTYPES, HALVES, make

SHAPES = [
    # lead, h, hkv, sq, sk, d: many heads, one head, few queries, few keys, odd sizes
    ((3,), 4, 4, 40, 40, 16),
    ((3,), 4, 2, 128, 128, 64),
    ((2,), 1, 1, 700, 700, 64),
    ((3,), 2, 1, 1, 1500, 32),
    ((2,), 2, 2, 1500, 3, 32),
    ((4,), 3, 1, 67, 197, 40),
]
RULES = [
    {},
    {"is_causal": True},
    {"is_causal": True, "q_offset": 5},
    {"window": (20, 3), "softcap": 2.0},
    {
        "softcap": 3.0,
        "alibi_slopes": np.array([0.5, 0.1, 1.0, 0.02], np.float32),
        "is_causal": True,
    },
]
# Dropout counts samples and heads, so it is the same alone only for the first of them.
DROPOUT = {"dropout_p": 0.2, "seed": 7, "softcap": 2.0}


def rules_for(isa, *turn, dropout=True):
    """Every rule on the best instruction set; on others, which share its plan, a third by turns."""
    rules = [*RULES, DROPOUT] if dropout else RULES
    best = isa == fusedattn.cpu_info()["isas"][-1]
    return rules if best else rules[sum(turn) % 3 :: 3]


def problem(shape, rules, dtype=np.float32, layout="bhsd"):
    rules = rules | {n: x[: shape[1]] for n, x in rules.items() if n == "alibi_slopes"}
    names = ("lead", "h", "hkv", "sq", "sk", "d")
    sizes = dict(zip(names, shape, strict=True))
    return make(sizes | {"dv": sizes["d"]}, rules=rules, dtype=dtype, layout=layout)


def assert_same_bits(got, expected):
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_repetition(isa, shape, dtype):
    for rules in rules_for(isa, SHAPES.index(shape), DTYPES.index(dtype)):
        p = problem(shape, rules, dtype)
        expected = fused(p, num_threads=1)
        for num_threads in (2, 3, 5, 8):
            assert_same_bits(fused(p, num_threads=num_threads), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_alone_or_in_a_batch(isa, shape, dtype):
    for rules in rules_for(isa, SHAPES.index(shape), DTYPES.index(dtype), dropout=False):
        p = problem(shape, rules, dtype)
        expected = fused(p)
        for b in range(shape[0][0]):
            alone = problem(shape, rules, dtype)
            for name in ("q", "k", "v", "dout"):
                setattr(alone, name, getattr(p, name)[b : b + 1])
            assert_same_bits(fused(alone), {name: x[b : b + 1] for name, x in expected.items()})
            assert_same_heads(p, alone, b, expected, shape[1] // shape[2])


def assert_same_heads(p, alone, b, expected, group):
    """The first key head of sample b and its query heads, alone."""
    for x in ("q", "dout"):
        setattr(alone, x, getattr(p, x)[b : b + 1, :group])
    for x in ("k", "v"):
        setattr(alone, x, getattr(p, x)[b : b + 1, :1])
    if "alibi_slopes" in p.rules:
        alone.rules["alibi_slopes"] = p.rules["alibi_slopes"][:group]
    got = fused(alone)
    for name in ("out", "lse", "dq"):
        np.testing.assert_array_equal(got[name], expected[name][b : b + 1, :group], name)
    for name in ("dk", "dv"):
        np.testing.assert_array_equal(got[name], expected[name][b : b + 1, :1], name)


@pytest.mark.parametrize("dtype", [np.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_layout_and_memory(isa, shape, dtype):
    p = problem(shape, {"is_causal": True}, dtype)
    expected = fused(p)
    other = problem(shape, {"is_causal": True}, dtype, "bshd")
    for name in ("q", "k", "v", "dout"):
        setattr(other, name, np.ascontiguousarray(getattr(p, name).swapaxes(1, 2)))
    got = fused(other)
    np.testing.assert_array_equal(got["lse"], expected["lse"])
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(got[name].swapaxes(1, 2), expected[name], name)
    view = problem(shape, {"is_causal": True}, dtype, "bshd")
    for name in ("q", "k", "v", "dout"):
        setattr(view, name, getattr(p, name).swapaxes(1, 2))
    assert_same_bits(fused(view), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rules", [*RULES, DROPOUT])
def test_packed_or_padded(isa, rules, layout, dtype):
    lengths = np.array([40, 1, 0, 197, 64, 130])
    longest = lengths.max()
    shape = ((len(lengths),), 4, 2, longest, longest, 32)
    p = problem(shape, rules | {"kv_lengths": lengths}, dtype, layout)
    expected = fused(p)
    rows = (np.arange(longest) < lengths[:, None])[..., None]

    def pack(x):
        """(B, S, H, D), in its layout, to (T, H, D)."""
        return p.heads_first(x).swapaxes(1, 2)[rows[..., 0]]

    cu = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v, dout = (pack(x) for x in (p.q, p.k, p.v, p.dout))
    out, lse = fusedattn.attention_varlen(q, k, v, cu, cu, return_lse=True, **rules)
    np.testing.assert_array_equal(out, pack(expected["out"]))
    np.testing.assert_array_equal(lse.T, expected["lse"].swapaxes(1, 2)[rows[..., 0]])
    grads = fusedattn.attention_varlen_backward(dout, q, k, v, out, lse, cu, cu, **rules)
    np.testing.assert_array_equal(grads.dq, pack(expected["dq"]))
    # Padding queries exist in the padded call and would give to dk and dv: silence them.
    p.dout = np.where(rows[:, None] if layout == "bhsd" else rows[..., None], p.dout, dtype(0))
    silent = fused(p)
    np.testing.assert_array_equal(grads.dk, pack(silent["dk"]))
    np.testing.assert_array_equal(grads.dv, pack(silent["dv"]))


@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=4)))
def test_bias_gradient(isa, kept):
    sq, sk = ((300, 300), (700, 40), (40, 700))[sum(kept[n] << n for n in range(4)) % 3]
    # Many tasks add to the same elements where the bias is broadcast.
    shape = tuple(n if keep else 1 for n, keep in zip((3, 4, sq, sk), kept, strict=True))
    # Rounding to 16 bits hides what differs in float32, so that is what all of them run in.
    for dtype in (np.float32, *HALVES) if not any(kept) else (np.float32,):
        p = problem(((3,), 4, 2, sq, sk, 16), {}, dtype)
        p.rules["bias"] = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        expected = fused(p, num_threads=1)
        for num_threads in (2, 3, 8, 2):
            assert_same_bits(fused(p, num_threads=num_threads), expected)


def test_whatever_the_thread_does_with_subnormal_numbers():
    """Kernels have a mode of their own, and leave the caller's as it was."""
    torch = pytest.importorskip("torch")
    p = problem(((2,), 4, 4, 70, 300, 16), {"alibi_slopes": np.full(4, 2.0, np.float32)})
    p.v[:, :, ::3] *= np.float32(1e-39)
    expected = fused(p)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        got = fused(p)
        assert torch.tensor([1e-39]) * 0.5 == 0
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, expected)
    assert torch.tensor([1e-39]) * 0.5 != 0
    fused(p)
    assert torch.tensor([1e-39]) * 0.5 != 0

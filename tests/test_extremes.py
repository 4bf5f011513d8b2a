"""Promise 1 at the edges of the numbers: logits and rules that are huge, tiny, negative or 0."""

import numpy as np
import pytest

from fusedattn import attention
from tests.accuracy import assert_accurate, fused
from tests.strategies import DTYPES, HALVES, make

BFLOAT = HALVES[1]


def problem(dtype, sq, **rules):
    sizes = {"lead": (2,), "h": 4, "hkv": 2, "sq": sq, "sk": 70, "d": 16, "dv": 9}
    return make(sizes, dtype=dtype, rules=rules)


def grow(x, factor):
    x[...] = (x.astype(np.float64) * factor).astype(x.dtype)


both_kernels = pytest.mark.parametrize("sq", [2, 20])  # that for few queries, and the tiled one
every_type = pytest.mark.parametrize("dtype", DTYPES)


@both_kernels
@every_type
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, 1e-30, 1e4, -1e4, 1e8])
def test_scale(isa, scale, dtype, sq):
    p = problem(dtype, sq, scale=scale)
    assert_accurate(fused(p), p)


@both_kernels
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("dtype", "q_power", "k_power"),
    [
        (np.float32, -126, 0),
        (np.float32, 0, -126),
        (np.float32, -130, 4),  # k times the scale is out of range, dq is not
        (np.float32, 80, -105),  # q is far out the other way
        (np.float32, -105, 80),
        (np.float32, 63, 63),
        (np.float32, 0, 100),
        (BFLOAT, -63, -63),
        (BFLOAT, 63, 63),
        (np.float64, -1020, 0),
        (np.float64, -1027, 4),
        (np.float64, 700, -1005),
        (np.float64, 0, 900),
    ],
)
def test_scales_that_would_take_operands_out_of_range(isa, dtype, q_power, k_power, softcap, sq):
    """Scale and operands moved apart by powers of two leave the logits as they are."""
    near = problem(dtype, sq, softcap=softcap, scale=0.25)
    far = problem(dtype, sq, softcap=softcap, scale=2.0 ** (-q_power - k_power - 2))
    if q_power in (-130, -1027):
        for p in (near, far):
            grow(p.dout, 2.0**-12)
    grow(far.q, 2.0**q_power)
    grow(far.k, 2.0**k_power)
    expected, got = fused(near), fused(far)
    grow(got["dq"], 2.0**q_power)
    grow(got["dk"], 2.0**k_power)
    # Instructions for bfloat16 round P and dS, which the kernels for such scales do not.
    eps = 2**-6 if dtype == BFLOAT else 1e-4
    for name, x in expected.items():
        x, y = x.astype(np.float64), got[name].astype(np.float64)
        np.testing.assert_allclose(y, x, rtol=eps, atol=eps * np.abs(x).max(), err_msg=name)


@both_kernels
@every_type
def test_scale_0_is_the_mean(isa, dtype, sq):
    p = problem(dtype, sq, scale=0.0)
    got = fused(p)
    mean = np.repeat(p.v.astype(np.float64).mean(axis=2, keepdims=True), 2, axis=1)
    eps = 1e-2 if p.v.dtype.itemsize == 2 else 1e-5
    np.testing.assert_allclose(got["out"].astype(np.float64), mean + 0 * got["out"], atol=eps)
    np.testing.assert_allclose(got["lse"], np.log(70), rtol=1e-6)
    for name in ("dq", "dk"):
        assert not got[name].any()


@both_kernels
@every_type
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_logits_beyond_the_range_of_float16(isa, softcap, dtype, sq):
    p = problem(dtype, sq, scale=1.0, softcap=softcap)
    grow(p.q, 300)
    grow(p.k, 300)
    got = fused(p)
    assert_accurate(got, p)
    assert softcap or got["lse"].max() > 1e5


@both_kernels
@every_type
def test_elements_near_the_largest_of_float16(isa, dtype, sq):
    p = problem(dtype, sq, scale=1e-3)
    grow(p.q, 12000)
    grow(p.k, 6000)
    assert_accurate(fused(p), p)


@both_kernels
@every_type
@pytest.mark.parametrize("scale", [1e8, 1e20, 1e30])
def test_a_hard_choice(isa, scale, dtype, sq):
    """Logits so far apart that each query has one key; the exact choice is a matter of rounding."""
    p = problem(dtype, sq, scale=scale)
    got = fused(p, need=())
    rows = np.repeat(p.v, 2, axis=1)[:, :, None]
    chosen = (got["out"][..., None, :] == rows).all(axis=-1).sum(axis=-1)
    np.testing.assert_array_equal(chosen, 1)
    assert np.isfinite(got["lse"]).all()
    got = fused(p)
    weights_of_1 = np.abs(p.dout.astype(np.float64)).reshape(2, 2, -1, 9).sum(axis=2)
    assert np.all(np.abs(got["dv"].astype(np.float64)) <= 1.01 * weights_of_1[:, :, None])
    for name in ("dq", "dk"):  # the products with scale leave the range of float16
        assert dtype == np.float16 or np.isfinite(got[name]).all()


@both_kernels
@every_type
@pytest.mark.parametrize(
    "rules",
    [
        {"alibi_slopes": np.array([1e3, 1e-3, 1.0, 0.0]), "q_offset": 10**6},
        {"alibi_slopes": np.array([-0.1, -1e-3, 1.0, 0.0])},
        {"sinks": np.array([1e4, -1e4, 100.0, -np.inf])},
        {"softcap": 1e-4},
        {"softcap": 1e6},
        {"softcap": 1e20},
        {"softcap": 1e38},
        {"softcap": 1.0, "scale": 1e20},
        {"dropout_p": 1.0, "seed": 1},
        {"dropout_p": 1 - 2**-20, "seed": 1},
        {"dropout_p": 2**-20, "seed": 2**64 - 1},
        {"dropout_p": 1e-10, "seed": 1},
    ],
    ids=str,
)
def test_rules(isa, rules, dtype, sq):
    p = problem(dtype, sq, **rules)
    assert_accurate(fused(p), p)


@both_kernels
@every_type
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_biases(isa, size, dtype, sq):
    p = problem(dtype, sq)
    rng = np.random.default_rng(0)
    p.rules["bias"] = rng.uniform(-size, size, (4, sq, 70)).astype(dtype)
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softcap_is_a_tanh_to_the_last_digits(isa, dtype):
    """With one key the log-sum-exp is its logit: softcap * tanh(q k / softcap), here of 1."""
    x = np.concatenate(
        [np.linspace(-12, 12, 20_001), np.logspace(-30, 1, 3_000), [-np.inf, np.inf]]
    )
    q, one = x.astype(dtype).reshape(1, 1, -1, 1), np.ones((1, 1, 1, 1), dtype)
    _, lse = attention(q, one, one, scale=1.0, softcap=1.0, return_lse=True)
    exact = np.tanh(q.astype(np.float64)).ravel()
    # A rounding each for tanh in log2 units, and for its way back; tanh's own 4.
    allowed = 6 * np.spacing(np.abs(exact).astype(dtype))
    assert (np.abs(lse.ravel() - exact) <= allowed).all()
    assert (np.abs(lse.ravel()[-2:]) == 1).all()

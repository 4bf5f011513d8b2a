"""Every length and head dimension around the widths of vectors and tiles, forward and backward."""

import numpy as np
import pytest

from tests.accuracy import assert_accurate, fused
from tests.strategies import DIMS, DTYPES, HALVES, LENGTHS, make


def sizes(sq, sk, d, dv, heads=(1, 1), lead=(1,)):
    return {"lead": lead, "h": heads[0], "hkv": heads[1], "sq": sq, "sk": sk, "d": d, "dv": dv}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", DIMS)
def test_lengths(isa, dtype, d):
    for n, sq in enumerate(LENGTHS):
        if dtype in HALVES and (n + d) % 3:
            continue  # float32's products and sums: a third of the lengths for each dimension
        sk = LENGTHS[(7 * n + d) % len(LENGTHS)]
        rules = [{}, {"is_causal": True}, {"is_causal": True, "q_offset": sk - sq}][n % 3]
        p = make(sizes(sq, sk, d, DIMS[(n + d) % len(DIMS)]), dtype=dtype, rules=rules, seed=n)
        assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_every_small_length(isa, dtype, causal):
    for sk in range(1, 70, 3 if dtype in HALVES else 1):
        p = make(sizes(1 + (37 * sk) % 69, sk, 8, 3), dtype=dtype, rules={"is_causal": causal})
        assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dv", DIMS)
def test_every_pair_of_dims(isa, dtype, dv):
    for d in DIMS:
        p = make(sizes(19, 35, d, dv), dtype=dtype)
        assert_accurate(fused(p), p)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(1, 3000), (3, 2049), (1500, 1), (40, 4096), (1100, 1100)])
def test_long(isa, causal, sq, sk):
    rules = {"is_causal": True, "q_offset": max(sk - sq, 0)} if causal else {}
    p = make(sizes(sq, sk, 64, 64, heads=(2, 1)), rules=rules)
    assert_accurate(fused(p), p, floor=1.0)


@pytest.mark.parametrize(
    ("dtype", "n"), [(np.float32, 400), (np.float64, 150), *((t, 400) for t in HALVES)]
)
@pytest.mark.parametrize("d", [8, 32, 64, 128, 256])
def test_with_many_numbers_luck_is_no_excuse(isa, dtype, n, d):
    p = make(sizes(n, n, d, d, heads=(2, 2)), dtype=dtype)
    assert_accurate(fused(p), p, floor=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-40.0, 1e-30, 5.0, 300.0])
def test_scores_far_apart(isa, dtype, scale):
    # Most weights underflow; the maximum is what keeps the rest.
    p = make(sizes(33, 130, 16, 16), dtype=dtype, rules={"scale": scale})
    assert_accurate(fused(p), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_maximum_that_moves_with_every_tile(isa, dtype, slope):
    # Logits rise or fall along the keys by far more than float32's exponential spans.
    p = make(sizes(20, 400, 4, 8), dtype=dtype)
    p.rules["bias"] = (slope * np.linspace(0, 4000, 400)).astype(dtype)
    assert_accurate(fused(p), p)

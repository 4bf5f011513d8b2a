"""Lengths of zero, anywhere, give the documented result."""

import numpy as np
import pytest

import fusedattn
from tests.accuracy import fused
from tests.strategies import DTYPES, make

SIZES = {"lead": (2,), "h": 4, "hkv": 2, "sq": 5, "sk": 6, "d": 8, "dv": 3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "zero", [{"lead": (0,)}, {"lead": (2, 0)}, {"h": 0, "hkv": 0}, {"sq": 0}, {"sk": 0}, {"dv": 0}]
)
def test_nothing(isa, zero, layout, dtype):
    p = make(SIZES | zero, layout=layout, dtype=dtype)
    got = fused(p)
    assert got["out"].shape == p.dout.shape
    assert got["lse"].shape == p.heads_first(p.dout).shape[:-1]
    for name, like in (("dq", p.q), ("dk", p.k), ("dv", p.v)):
        assert got[name].shape == like.shape
        assert got[name].dtype == dtype
        assert np.all(got[name] == 0)
    assert np.all(got["out"] == 0)
    if "dv" not in zero:
        assert np.all(np.isneginf(got["lse"]))


@pytest.mark.parametrize("rules", [{"is_causal": True}, {"mask": np.ones((1, 1), bool)}])
def test_no_keys_with_rules(isa, rules):
    p = make(SIZES | {"sk": 0}, rules=rules)
    got = fused(p)
    assert np.all(got["out"] == 0)
    assert np.all(np.isneginf(got["lse"]))


def test_out_is_written_where_there_are_no_keys(isa):
    p = make(SIZES | {"sk": 0})
    out = np.full(p.dout.shape, np.nan, np.float32)
    fusedattn.attention(p.q, p.k, p.v, out=out)
    assert np.all(out == 0)

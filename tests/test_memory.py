"""Promise 3: no array of Sq x Sk is ever made, forward or backward."""

import sys

import pytest

from tests.test_threads import run

PEAK = """
import resource
import numpy as np
import fusedattn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

S, D = 16384, 64
rng = np.random.default_rng(0)
q, k, v, dout = (rng.standard_normal((1, 1, S, D), np.float32) for _ in range(4))
small = q[:, :, :64]
rules = {rules}

def work(q, k, v, dout):
    out, lse = fusedattn.attention(q, k, v, return_lse=True, num_threads=2, **rules)
    return fusedattn.attention_backward(dout, q, k, v, out, lse, num_threads=2, **rules)

fusedattn.attention(small, small, small)
before = peak()
work(q, k, v, dout)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize(
    "rules",
    [
        '{"is_causal": True}',
        '{"mask": np.ones((1, S), bool)}',
        '{"bias": np.zeros((S, 1), np.float32)}',
    ],
)
def test_scratch_is_linear(rules):
    results = 16384 * (4 * 64 + 1) * 4
    grown = int(run(PEAK.replace("{rules}", rules)))
    assert grown < results + 2 * 16384 * 64 * 4 + 2**24  # S x S floats would be a gibibyte

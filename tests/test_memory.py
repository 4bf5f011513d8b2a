"""Promise 3: scratch memory grows with the length, not with its square, forward and backward."""

import sys

import pytest

from tests.test_threads import run

# VmHWM, the most that this process had in memory at once. Not getrusage's ru_maxrss: a process
# starts with the mark of the one that started it, under which a gibibyte would hide.
SCRATCH = """
import numpy as np
from ml_dtypes import bfloat16
import fusedattn

def memory(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) * 1024

S, D = {S}, 64
rng = np.random.default_rng(0)
shape = (1, 1, S, D)
q, k, v, dout = (rng.standard_normal(shape, np.float32).astype({dtype}) for _ in range(4))
rules = {rules}
before = memory("VmRSS")
out, lse = fusedattn.attention(q, k, v, return_lse=True, num_threads=2, **rules)
need = ("q", "k", "v", *({{"bias"}} & set(rules)))
grads = fusedattn.attention_backward(dout, q, k, v, out, lse, need=need, num_threads=2, **rules)
results = sum(x.nbytes for x in (out, lse, *grads) if x is not None)
print(memory("VmHWM") - before - results)
"""
CASES = [
    (16384, "np.float32", "{}"),
    (8192, "np.float32", '{"mask": np.ones((1, S), bool)}'),
    (8192, "np.float32", '{"bias": np.zeros((S, 1), np.float32)}'),
    (8192, "np.float32", '{"bias": np.zeros((1, S), np.float32)}'),
    (8192, "bfloat16", '{"bias": np.zeros((1, 1), bfloat16)}'),
    (8192, "np.float64", '{"is_causal": True}'),
    (8192, "np.float16", '{"is_causal": True}'),
    (8192, "bfloat16", '{"is_causal": True}'),
    # What a window leaves out saves time, not scratch: the same blocks and statistics.
    (16384, "np.float32", '{"window": (50, 50)}'),
    (65536, "np.float32", '{"window": (50, 50)}'),
    (65536, "np.float16", '{"window": (50, 50)}'),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("length", "dtype", "rules"), CASES)
def test_scratch_is_linear(length, dtype, rules):
    """At 65536 under 64 MiB, threads and code included; at other lengths their part of it."""
    code = SCRATCH.format(S=length, dtype=dtype, rules=rules)
    # Arrays come from the system and go back to it, so that none lives in what another one left.
    scratch = int(run(code, MALLOC_MMAP_THRESHOLD_="65536"))
    assert scratch < 64 * 2**20 * length / 65536

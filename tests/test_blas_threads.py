"""NumPy's matrix products stay right when OpenBLAS computes them on our pool of threads."""

import os

import pytest

from tests.test_threads import run

# Prints whether OpenBLAS's jobs go to somebody else's pool; "unknown" where it cannot tell.
SERVED = """
import ctypes
def served():
    try:
        with open("/proc/self/maps") as file:
            paths = {line.split()[-1] for line in file if "openblas" in line}
        libraries = [ctypes.CDLL(path) for path in sorted(paths)]
        pointers = [ctypes.c_void_p.in_dll(x, "openblas_threads_callback_") for x in libraries]
    except (OSError, ValueError):
        return "unknown"
    return str(any(p.value for p in pointers)) if pointers else "unknown"
"""

# Integers small enough for float64 to add without rounding: a product has one right answer, and
# NumPy's own integer loops, which know no BLAS, give it.
SETUP = (
    SERVED
    + """
import os, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import fusedattn

rng = np.random.default_rng(0)

def factors(n, m=None, k=None):
    shapes = (n, k or n), (k or n, m or n)
    return [rng.integers(-9, 10, shape).astype(np.float64) for shape in shapes]

def exact(a, b):
    return np.matmul(a.astype(np.int64), b.astype(np.int64))

SHAPES = [(300,), (513,), (700, 40, 90), (64, 900, 300), (1, 800, 800), (800, 1, 800)]
products = [(a, b, exact(a, b)) for a, b in (factors(*shape) for shape in SHAPES)]
q, k, v, dout = (rng.standard_normal((2, 4, 200, 64), np.float32) for _ in range(4))

def attention():
    out, lse = fusedattn.attention(q, k, v, return_lse=True, num_threads=2)
    return [out, *fusedattn.attention_backward(dout, q, k, v, out, lse, num_threads=2)[:3]]

expected = [fusedattn.attention(q, k, v, num_threads=1)]

def check_products():
    for a, b, c in products:
        assert np.array_equal(a @ b, c)
        assert np.array_equal(b.T @ a.T, c.T)

def check_attention():
    assert np.array_equal(attention()[0], expected[0])
"""
)

ALTERNATE = (
    SETUP
    + """
check_products()
for _ in range(20):
    check_attention()
    check_products()
"""
)

AT_ONCE = (
    SETUP
    + """
check_attention()
start = threading.Barrier(6)
def work(n):
    start.wait()
    for _ in range(8):
        (check_attention if n % 2 else check_products)()
with ThreadPoolExecutor(6) as pool:
    list(pool.map(work, range(6)))
check_products()
check_attention()
"""
)

# OpenBLAS keeps products of one kind apart by a lock of their own, and nothing else: its scratch
# memory belongs to a job's number, so jobs of different kinds must not run at the same time.
KINDS = (
    SETUP
    + """
a, b = factors(300)
kinds = [(a, b), (a, b.T), (a.T, b), (a.T, b.T), (a, a.T)]
kinds = [(x, y, exact(x, y)) for x, y in kinds]
check_attention()
start = threading.Barrier(len(kinds))
def work(kind):
    x, y, c = kind
    start.wait()
    return sum(not np.array_equal(x @ y, c) for _ in range(40))
with ThreadPoolExecutor(len(kinds)) as pool:
    wrong = list(pool.map(work, kinds))
assert wrong == [0] * len(kinds), f"wrong products of 40, by kind: {wrong}"
"""
)

FORK = (
    SETUP
    + """
check_attention()
check_products()
for first in (check_products, check_attention):
    child = os.fork()
    if child == 0:
        try:
            first()
            check_attention()
            check_products()
        except BaseException:
            os._exit(1)
        os._exit(0)
    check_products()
    assert os.waitpid(child, 0)[1] == 0
    check_attention()
"""
)

LAPACK = (
    SETUP
    + """
check_attention()
a = factors(400)[0] + 4000 * np.eye(400)
x = rng.integers(-9, 10, (400, 30)).astype(np.float64)
assert np.allclose(np.linalg.solve(a, a @ x), x, rtol=0, atol=1e-9)
s = a @ a.T
values, vectors = np.linalg.eigh(s)
assert np.allclose((vectors * values) @ vectors.T, s, rtol=0, atol=1e-9 * values[-1])
check_attention()
"""
)

EVERY = {
    "alternate": ALTERNATE,
    "at once": AT_ONCE,
    "kinds at once": KINDS,
    "fork": FORK,
    "lapack": LAPACK,
}
WAYS = {
    "shared": {},
    "not shared": {"FUSEDATTN_SHARE_BLAS_THREADS": "0"},
    "shared, 4 BLAS threads": {"OPENBLAS_NUM_THREADS": "4"},
    "shared, attention on 1": {"FUSEDATTN_NUM_THREADS": "1"},
}


# Not shared, OpenBLAS has threads of its own: it is not ours to test beyond the way back and fork.
CASES = [(n, w) for n in EVERY for w in WAYS if w != "not shared" or n in ("alternate", "fork")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_right_answers(name, way):
    if name == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    assert run(EVERY[name] + "\nprint('right')", **WAYS[way]) == "right"


ASK = SETUP + "\nbefore = served(); attention(); print(before, served())"


def test_the_pool_serves_openblas_unless_told_not_to():
    answer = run(ASK)
    if "unknown" in answer:
        pytest.skip("this NumPy's BLAS is no OpenBLAS that says who serves it")
    assert answer == "False True"
    assert run(ASK, FUSEDATTN_SHARE_BLAS_THREADS="0") == "False False"


FIRST = """
import ctypes
callback = ctypes.CFUNCTYPE(None)(lambda: None)
with open("/proc/self/maps") as file:
    path = next(line.split()[-1] for line in file if "openblas" in line)
pointer = ctypes.c_void_p.in_dll(ctypes.CDLL(path), "openblas_threads_callback_")
mine = ctypes.cast(callback, ctypes.c_void_p).value
pointer.value = mine
fusedattn.attention(q, k, v, num_threads=2)
print(pointer.value == mine)
pointer.value = None
"""


def test_an_openblas_that_somebody_else_serves_is_left_alone():
    if "unknown" in run(ASK):
        pytest.skip("this NumPy's BLAS is no OpenBLAS that says who serves it")
    before_any_parallel_call = SETUP.replace(
        "expected = [fusedattn", "expected = lambda: [fusedattn"
    )
    assert run(before_any_parallel_call + FIRST) == "True"

"""Promise 5: threads inside, threads outside, forked children, interrupts."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fusedattn
from tests.accuracy import fused
from tests.strategies import make

SIZES = {"lead": (2,), "h": 4, "hkv": 4, "sq": 130, "sk": 130, "d": 32, "dv": 32}


def run(code, **environment):
    """What a fresh Python prints; a hang fails the test."""
    inherited = {k: v for k, v in os.environ.items() if "NUM_THREADS" not in k}
    inherited.pop("FUSEDATTN_ISA", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_calls_from_many_python_threads_at_once():
    sizes = [SIZES | {"sq": 1 + 17 * n % 140, "lead": (1 + n % 3,)} for n in range(24)]
    problems = [make(s, seed=n, rules={"is_causal": bool(n % 2)}) for n, s in enumerate(sizes)]
    expected = [fused(p, num_threads=1) for p in problems]

    def work(n):
        return fused(problems[n % 24], num_threads=1 + n % 3)

    with ThreadPoolExecutor(8) as pool:
        for n, got in enumerate(pool.map(work, range(192))):
            for name, x in expected[n % 24].items():
                np.testing.assert_array_equal(got[name], x, name)


def test_the_gil_is_released():
    # One call of many seconds' worth of work; meanwhile this thread must get its turns.
    p = make(SIZES | {"lead": (1,), "h": 1, "hkv": 1, "sq": 4000, "sk": 4000, "d": 64, "dv": 64})
    turns, done = 0, threading.Event()

    def work():
        fused(p, num_threads=1)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.wait(0.001):
        turns += 1
    worker.join()
    assert turns >= 5


FORK = """
import os
import numpy as np
import fusedattn

rng = np.random.default_rng(0)
q, k, v, dout = (rng.standard_normal((2, 4, 300, 64)).astype(np.float32) for _ in range(4))

def work():
    out, lse = fusedattn.attention(q, k, v, return_lse=True, num_threads=2)
    return [out, *fusedattn.attention_backward(dout, q, k, v, out, lse, num_threads=2)[:3]]

expected = work()
child = os.fork()
if child == 0:
    got = work()
    same = all(np.array_equal(x, y) for x, y in zip(got, expected))
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if all(np.array_equal(x, y) for x, y in zip(work(), got)) else 1)
    os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
after = work()
assert os.waitpid(child, 0)[1] == 0
assert all(np.array_equal(x, y) for x, y in zip(after, expected))
print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_compute_and_do_not_hang():
    assert run(FORK) == "right"


COUNT = "import fusedattn; print(fusedattn.get_num_threads())"


def test_environment_sets_the_number_of_threads():
    assert run(COUNT, FUSEDATTN_NUM_THREADS="3") == "3"
    assert run(COUNT, OMP_NUM_THREADS="3") == "3"
    assert run(COUNT, FUSEDATTN_NUM_THREADS="2", OMP_NUM_THREADS="3") == "2"
    assert run(COUNT) == str(len(os.sched_getaffinity(0)))


def test_set_num_threads():
    before = fusedattn.get_num_threads()
    try:
        fusedattn.set_num_threads(3)
        assert fusedattn.get_num_threads() == 3
        assert fusedattn.cpu_info()["num_threads"] == 3
    finally:
        fusedattn.set_num_threads(before)


ISA = "import fusedattn; print(fusedattn.cpu_info()['isa'])"


def test_environment_chooses_the_instruction_set():
    isas = fusedattn.cpu_info()["isas"]
    for isa in isas:
        assert run(ISA, FUSEDATTN_ISA=isa) == isa
    assert run(ISA) == isas[-1]


@pytest.mark.parametrize("name", ["sse9", "AVX2 ", "neon" if sys.platform != "darwin" else "avx2"])
def test_an_instruction_set_that_is_not_there_is_refused(name):
    if name in fusedattn.cpu_info()["isas"]:
        pytest.skip(f"{name} is there")
    code = """
try:
    import fusedattn
    fusedattn.attention(*[__import__("numpy").zeros((4, 4), "f4")] * 3)
except (ValueError, ImportError) as error:
    print(error)
"""
    message = run(code, FUSEDATTN_ISA=name)
    assert "FUSEDATTN_ISA" in message
    assert name.strip() in message
    for isa in fusedattn.cpu_info()["isas"]:
        assert isa in message


INTERRUPT = """
import os, signal, threading, time
import numpy as np
import fusedattn

q = np.zeros((1, 64, 8192, 64), np.float32)
out = np.full(q.shape, np.nan, np.float32)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    fusedattn.attention(q, q, q, out=out)
except KeyboardInterrupt:
    assert np.isnan(out).any(), "the call went on to its end"
    print("interrupted")
q = np.eye(3, dtype=np.float32)
assert fusedattn.attention(q, q, q).shape == (3, 3)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="no SIGINT")
def test_ctrl_c_ends_in_keyboard_interrupt():
    assert run(INTERRUPT) == "interrupted"


LIMIT = """
import threadpoolctl, fusedattn
with threadpoolctl.threadpool_limits(limits=1):
    print(fusedattn.get_num_threads())
print(fusedattn.get_num_threads())
"""


@pytest.mark.parametrize("variable", ["FUSEDATTN_NUM_THREADS", "OMP_NUM_THREADS"])
def test_threadpoolctl_is_honoured(variable):
    pytest.importorskip("threadpoolctl", reason="tests its limits")
    assert run(LIMIT, **{variable: "2"}) == "1\n2"
    assert run("import fusedattn; fusedattn.get_num_threads()" + LIMIT, **{variable: "2"}) == "1\n2"

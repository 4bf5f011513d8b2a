"""What the benchmarks count, whom they compare and how they take turns; never how fast it is."""

import numpy as np
import pytest

from fusedattn.bench import CASES, Case, Limits, Problem, Result, contenders
from fusedattn.bench.implementations import disagreement
from fusedattn.bench.timing import interleave

SMALL = [
    Case("square", 2, 3, 20, 20, 8),
    Case("causal", 1, 2, 33, 33, 16, causal=True),
    Case("wide", 1, 2, 10, 30, 8, causal=True),
    Case("tall", 1, 2, 30, 10, 8, causal=True),
    Case("grouped", 2, 6, 17, 40, 8, hkv=2, dv=24),
    Case("multi-query", 1, 4, 9, 9, 32, hkv=1, causal=True),
    Case("double", 1, 2, 50, 50, 16, dtype="float64"),
    Case("decode", 2, 4, 1, 100, 16),
]
IDS = [case.name for case in SMALL]


@pytest.mark.parametrize("case", SMALL, ids=IDS)
def test_counts(case):
    seen = np.tri(case.sq, case.sk) if case.causal else np.ones((case.sq, case.sk))
    assert case.pairs == case.b * case.h * seen.sum()
    assert case.flops("forward") == case.pairs * (2 * case.d + 2 * case.dv)
    assert case.flops("backward") == 2.5 * case.flops("forward")
    q, k, v, dout = Problem(case).arrays
    assert case.bytes("forward") == q.nbytes + k.nbytes + v.nbytes + dout.nbytes
    assert case.bytes("backward") == 2 * case.bytes("forward")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", SMALL, ids=IDS)
def test_contenders_agree(case, direction):
    ours, *others = contenders(Problem(case), direction, threads=2)
    assert ours.name == "fusedattn"
    assert others[0].name == "numpy"
    for other in others:
        assert disagreement(case, direction, ours, other) <= 2, other.name


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_disagreement_is_seen(direction):
    case = SMALL[0]
    ours, numpy = contenders(Problem(case), direction, threads=1)[:2]
    other = contenders(Problem(case, seed=1), direction, threads=1)[0]
    assert disagreement(case, direction, ours, numpy) <= 2
    assert disagreement(case, direction, ours, other) > 1000


def test_numpy_is_left_out_where_its_scores_would_not_fit(monkeypatch):
    case = SMALL[0]
    monkeypatch.setattr("fusedattn.bench.implementations.NUMPY_BYTES", 3 * case.score_bytes)
    names = {
        direction: [c.name for c in contenders(Problem(case), direction, threads=1)]
        for direction in ("forward", "backward")
    }
    assert "numpy" in names["forward"]
    assert "numpy" not in names["backward"]


def test_decoding_is_not_differentiated():
    assert CASES["decode"].directions == ("forward",)
    assert CASES["bert-128"].directions == ("forward", "backward")


def test_interleave_gives_everyone_the_rounds_that_it_promises():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    samples = interleave(calls, min_rounds=4, seconds=0.0, sample=0.0)
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert (
        order[6:] == ["a", "b", "c"] * 4
    )  # after two calls each to warm up and to size the samples


def test_interleave_keeps_the_first_while_anybody_stays():
    clock = iter(range(10**6))
    calls = {"quick": lambda: None, "slow": lambda: next(clock)}
    samples = interleave(calls, min_rounds=2, max_rounds=5, seconds=1e9, sample=0.0)
    assert len(samples["quick"]) == len(samples["slow"]) == 5


def test_result_reads_medians_and_ratios_of_rounds():
    case = Case("square", 1, 1, 1000, 1000, 50)  # 2e8 flops forward
    samples = {"fusedattn": [2e-3, 1e-3, 4e-3, 1e-3], "numpy": [4e-3, 3e-3, 4e-3]}
    result = Result(case, "forward", Limits(flops=4e11, bytes=1e10), samples)
    assert not result.memory_bound
    assert result.seconds() == pytest.approx(1.5e-3)
    assert result.rate() == pytest.approx(2e8 / 1.5e-3)
    assert result.share() == pytest.approx(2e8 / 1.5e-3 / 4e11)
    assert result.speedup("numpy") == pytest.approx(2)  # of 2, 3 and 1
    assert result.speedup("pytorch") is None
    assert result.seconds("pytorch") is None


def test_decoding_is_bound_by_memory():
    case = CASES["decode"]
    result = Result(case, "forward", Limits(flops=2e11, bytes=3e10), {"fusedattn": [0.1]})
    assert result.memory_bound
    assert result.rate() == pytest.approx(case.bytes("forward") / 0.1)
    assert result.share() == pytest.approx(case.bytes("forward") / 0.1 / 3e10)

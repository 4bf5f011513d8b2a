"""What the benchmarks count, whom they compare and how they take turns; never how fast it is."""

import numpy as np
import pytest

from fusedattn.bench import CASES, Case, Limits, Problem, Result, contenders, lengths
from fusedattn.bench.cases import DTYPES, select
from fusedattn.bench.comparisons import COMPARISONS, matching
from fusedattn.bench.implementations import disagreement
from fusedattn.bench.ratios import Comparison, Sides, compare
from fusedattn.bench.scaling import DEFAULT_CASES, Scaling, measure_scaling, thread_counts
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
    Case("decode-grouped", 1, 6, 1, 50, 16, hkv=2),
    Case("half", 1, 2, 40, 40, 16, dtype="float16"),
    Case("brain", 1, 4, 33, 33, 16, hkv=2, dtype="bfloat16"),
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


@pytest.mark.parametrize(
    ("case", "direction"),
    [pytest.param(c, d, id=f"{c.name}-{d}") for c in SMALL for d in c.directions],
)
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
    assert CASES["decode"].directions == CASES["few-16"].directions == ("forward",)
    assert CASES["bert-128"].directions == CASES["tiny"].directions == ("forward", "backward")


def test_select_by_pattern_and_dtype():
    assert select() == list(CASES.values())
    assert [c.name for c in select(["few-?", "tiny"])] == ["few-2", "few-4", "few-8", "tiny"]
    # A shape that is there in two dtypes is there once in a third.
    (found,) = select(["bert-512", "bf16-512"], ["float64"])
    assert (found.name, found.dtype) == ("bert-512", "float64")
    assert {c.dtype for c in select(["tiny"], DTYPES)} == set(DTYPES)
    with pytest.raises(ValueError, match="got 'nonsense'"):
        select(["tiny", "nonsense"])


def test_a_comparison_makes_up_for_different_work():
    order = []
    directions = ("forward", "backward")

    def prepare(direction, threads):
        assert threads == 3
        return Sides(lambda: order.append("ours"), lambda: order.append("beside"), factor=1e9)

    rows = list(compare(Comparison("name", "text", 1.0, prepare, directions), 3, quick=True))
    assert [r.direction for r in rows] == ["forward", "backward"]
    assert set(order) == {"ours", "beside"}
    for r in rows:
        assert r.ours > 0
        assert r.beside > 0
        assert r.ratio > 1  # whatever the two calls took
        assert not r.met
        assert r.line().endswith("MISSED")
        assert r.as_dict()["at_most"] == 1.0


def test_comparisons_are_found_by_pattern():
    assert [c.name for c in matching()] == list(COMPARISONS)
    assert [c.name for c in matching(["causal", "few-2*"])] == [
        "causal",
        "few-2-decode",
        "few-2-prefill",
    ]
    with pytest.raises(ValueError, match="got 'nonsense'"):
        matching(["nonsense"])


@pytest.mark.parametrize("name", ["sentences", "few-4-decode"])
def test_sides_are_ready_to_be_called(name):
    c = COMPARISONS[name]
    for direction in c.directions:
        sides = c.prepare(direction, 2)
        sides.ours()
        sides.beside()


def test_the_exponent_of_a_square_is_two():
    points = [lengths.Point(s, 3e-9 * s**2, 7e-9 * s**1.5, 0) for s in (512, 1024, 4096)]
    assert lengths.exponent(points, "forward") == pytest.approx(2)
    assert lengths.exponent(points, "backward") == pytest.approx(1.5)
    assert points[0].rate("forward") == pytest.approx(4 * 64 / 3e-9)
    assert points[0].rate("backward") == pytest.approx(10 * 64 * 512**0.5 / 7e-9)


@pytest.mark.parametrize(
    ("most", "counts"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])],
)
def test_thread_counts_end_with_the_most(most, counts):
    assert thread_counts(most) == counts


def test_scaling_has_cases_to_begin_with():
    assert [c.name for c in select(DEFAULT_CASES)] == list(DEFAULT_CASES)


def test_scaling_reads_ratios_of_rounds_and_sets_the_peak_beside_them():
    case = Case("square", 1, 1, 1000, 1000, 50)  # 2e8 flops forward
    samples = {1: [8e-3, 4e-3, 6e-3, 4e-3], 4: [2e-3, 2e-3, 2e-3]}
    found = Scaling(case, "forward", samples, {1: 1e11, 4: 3.2e11})
    assert found.threads == [1, 4]
    assert (found.speedup(1), found.efficiency(1), found.peak_efficiency(1)) == (1, 1, 1)
    assert found.seconds(1) == pytest.approx(5e-3)
    assert found.speedup(4) == pytest.approx(3)  # of 4, 2 and 3
    assert found.efficiency(4) == pytest.approx(0.75)
    assert found.share(4) == pytest.approx(2e8 / 2e-3 / 3.2e11)
    assert found.peak_speedup(4) == pytest.approx(3.2)
    assert found.peak_efficiency(4) == pytest.approx(0.8)
    assert found.lines()[1].split()[-7:] == ["3.00", "75", "%", "31", "%", "80", "%"]
    assert [p["speedup"] for p in found.as_dict()["by_threads"]] == pytest.approx([1, 3])


def test_scaling_takes_the_higher_peak_and_lets_thread_counts_take_turns(monkeypatch):
    peaks = iter([5.0, 1.0, 1.0, 3.0, 7.0, 2.0])  # of 1, 2 and 3 threads, before and after
    asked, called = [], []
    monkeypatch.setattr(
        "fusedattn._core.measure_peak", lambda dtype, n: asked.append((dtype, n)) or next(peaks)
    )
    monkeypatch.setattr(
        "fusedattn.bench.scaling.FusedAttention.forward",
        lambda self: called.append(self.rules["num_threads"]),
    )
    monkeypatch.setattr(
        "fusedattn.bench.scaling.interleave",
        lambda calls, **options: {n: [float(c() or n)] for n, c in calls.items()},
    )
    found = measure_scaling(Problem(SMALL[6]), "forward", 3)
    assert asked == [("float64", n) for n in (1, 2, 3)] * 2
    assert called == [1, 2, 3]
    assert found.peaks == {1: 5.0, 2: 7.0, 3: 2.0}
    assert found.samples == {1: [1.0], 2: [2.0], 3: [3.0]}


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

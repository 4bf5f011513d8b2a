"""The cases of ``fusedattn bench`` under pytest-benchmark: ``pytest benchmarks``.

Every benchmark first asserts that its contender and ours give the same answer; a figure for a wrong
answer is worth nothing. ``--benchmark-disable`` keeps the assertions and drops the timing.
"""

import pytest

from fusedattn import get_num_threads
from fusedattn.bench import CASES, Problem, contenders
from fusedattn.bench.implementations import disagreement

PAIRS = [(name, direction) for name, case in CASES.items() for direction in case.directions]
AGREE = 2.0  # in the unit of disagreement(): both sides may be off by one


@pytest.mark.parametrize(("name", "direction"), PAIRS)
def test_attention(benchmark, name, direction):
    """Time ours; assert that it agrees with everyone who can compute the case."""
    case = CASES[name]
    ours, *others = contenders(Problem(case), direction, get_num_threads())
    for other in others:
        assert disagreement(case, direction, ours, other) <= AGREE, other.name
    benchmark.group = f"{name} {direction}"
    benchmark.extra_info["flops"] = case.flops(direction)
    benchmark(getattr(ours, direction))


@pytest.mark.parametrize(("name", "direction"), PAIRS)
@pytest.mark.parametrize("rival", ["numpy", "pytorch"])
def test_rival(benchmark, name, direction, rival):
    """Time a rival on the same case, after the same assertion."""
    case = CASES[name]
    ours, *others = contenders(Problem(case), direction, get_num_threads())
    found = {other.name: other for other in others}
    if rival not in found:
        pytest.skip(f"{rival} is not installed, or would need too much memory for this case")
    assert disagreement(case, direction, ours, found[rival]) <= AGREE
    benchmark.group = f"{name} {direction}"
    benchmark(getattr(found[rival], direction))

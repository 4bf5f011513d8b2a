"""The cases of ``fusedattn bench`` under pytest-benchmark: ``pytest benchmarks``.

Every benchmark first asserts that all contenders give the same answer: a figure for a wrong one is
worth nothing. ``--benchmark-disable`` keeps the assertions and drops the timing.
"""

import functools

import pytest

from fusedattn import get_num_threads
from fusedattn.bench import CASES, Problem, contenders
from fusedattn.bench.implementations import disagreement

AGREE = 2.0  # in the unit of disagreement(): both sides may be off by one
WHO = ("fusedattn", "numpy", "pytorch")
ALL = [(n, d, who) for n, case in CASES.items() for d in case.directions for who in WHO]


@functools.lru_cache(maxsize=1)  # the three contenders of one case follow each other
def prepared(name, direction):
    """The contenders of a case by name, after asserting that they agree."""
    case = CASES[name]
    ours, *others = contenders(Problem(case), direction, get_num_threads())
    for other in others:
        assert disagreement(case, direction, ours, other) <= AGREE, other.name
    return {contender.name: contender for contender in (ours, *others)}


@pytest.mark.parametrize(("name", "direction", "who"), ALL)
def test_attention(benchmark, name, direction, who):
    found = prepared(name, direction)
    if who not in found:
        pytest.skip(f"{who} is not installed, or would need too much memory for this case")
    benchmark.group = f"{name} {direction}"
    benchmark.extra_info["flops"] = CASES[name].flops(direction)
    benchmark(getattr(found[who], direction))

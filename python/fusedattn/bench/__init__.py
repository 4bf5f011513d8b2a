"""Microbenchmarks of attention: the cases, the contenders and how they are timed.

``fusedattn bench`` prints them as a table and ``benchmarks/`` runs them under pytest-benchmark.
Counting follows one rule everywhere: only pairs of a query and a key that may see each other count,
a forward pass costs ``2 D + 2 Dv`` flops a pair, a backward pass 2.5 times that (five products for
two), however much more an implementation chooses to compute.
"""

from fusedattn.bench.cases import CASES, Case, Problem
from fusedattn.bench.implementations import Contender, contenders
from fusedattn.bench.timing import Limits, Result, measure

__all__ = ["CASES", "Case", "Contender", "Limits", "Problem", "Result", "contenders", "measure"]

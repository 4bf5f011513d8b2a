"""``python -m tests.bits``: hash the results of fixed calls, and compare.

    python -m tests.bits write FILE      hashes of every call, on every instruction set of this CPU
    python -m tests.bits compare FILE    which of them are no longer those of FILE
    python -m tests.bits across          which differ between instruction sets that fuse
                                         multiplication and addition

The last two end with 1 where something differs; of `across` only float32 and float64 count, the
others are for information. Each instruction set runs in a process of its own, for `across` each but
the last with a NumPy that takes the CPU for an old one: what layers, losses and training take from
NumPy must not depend on that either. A NaN is hashed as one and the same NaN.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

import fusedattn
from tests.bits import attention, layers

Hashes = dict[str, str]  # by "kind/dtype/case/result"
FUSED = ("avx2", "avx512", "neon")
EXACT = ("float32", "float64")


def digest(x: np.ndarray) -> str:
    """Of the dtype, the shape and the values in order."""
    x = np.ascontiguousarray(x)
    missing = np.isnan(x)
    if missing.any():
        x = np.where(missing, x.dtype.type(np.nan), x)
    found = hashlib.sha256(f"{x.dtype.name} {x.shape} ".encode())
    found.update(x.tobytes())
    return found.hexdigest()[:16]


def hashes(every: int, only: str) -> Hashes:
    """Of the calls whose name contains ``only``, each ``every``-th, with this process's kernel."""
    found: Hashes = {}
    listed = itertools.chain(attention.cases(), layers.cases())
    chosen = (case for case in listed if only in case[0])
    with np.errstate(all="ignore"):
        for name, run in itertools.islice(chosen, 0, None, every):
            for result, x in run().items():
                key = f"{name}/{result}"
                if key in found:
                    raise ValueError(f"two results are called {key}")
                found[key] = digest(x)
    return found


def old_cpu() -> dict[str, str]:
    """Environment in which NumPy and its BLAS do without what not every CPU has."""
    features = __import__("numpy._core._multiarray_umath", fromlist=["_"]).__cpu_dispatch__
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(features), "OPENBLAS_CORETYPE": "Haswell"}


def hashes_by_isa(isas: list[str], every: int, only: str, across: bool) -> dict[str, Hashes]:
    """`hashes` of each instruction set, a process each."""
    found = {}
    for isa in isas:
        numpys = old_cpu() if across and isa != isas[-1] else {}
        command = [sys.executable, "-m", "tests.bits", "hashes", f"--every={every}"]
        done = subprocess.run(
            [*command, f"--only={only}"],
            env=os.environ | numpys | {"FUSEDATTN_ISA": isa},
            stdout=subprocess.PIPE,
            check=True,
        )
        found[isa] = json.loads(done.stdout)
    return found


def differences(one: Hashes, other: Hashes, title: str) -> set[str]:
    """Print which results differ, a line a kind and dtype; give their names. A missing one does."""
    total: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: dict[str, Counter[str]] = defaultdict(Counter)
    example: dict[str, str] = {}
    for name in sorted(one.keys() | other.keys()):
        kind, dtype, case, result = name.split("/", 3)
        group, result = f"{kind}/{dtype}", result.rsplit(".", 1)[-1]
        total[group][result] += 1
        if one.get(name) != other.get(name):
            wrong[group][result] += 1
            example.setdefault(group, case)
    for group, counts in wrong.items():
        parts = (f"{result} {n} of {total[group][result]}" for result, n in counts.items())
        print(f"{title}: {group}: {', '.join(parts)}; first {example[group]!r}")
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.bits", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("write", "compare", "across", "hashes"))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--every", type=int, default=1, help="one case of so many")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--isa", action="append", help="instruction sets, by default all")
    given = parser.parse_args(arguments)
    if (given.file is None) == (given.action in ("write", "compare")):
        parser.error("write and compare take a file, the others none")
    isas = given.isa or fusedattn.cpu_info()["isas"]

    if given.action == "hashes":
        json.dump(hashes(given.every, given.only), sys.stdout)
        return 0
    if given.action == "across":
        isas = [isa for isa in isas if isa in FUSED]
    found = hashes_by_isa(isas, given.every, given.only, given.action == "across")
    count = sum(len(results) for results in found.values())
    print(f"{count} results on {', '.join(isas)}")
    if given.action == "write":
        given.file.write_text(json.dumps(found, indent=0))
        return 0
    if given.action == "across":
        wrong = set()
        for one, other in itertools.combinations(isas, 2):
            wrong |= differences(found[one], found[other], f"{one} and {other}")
        return int(any(name.split("/")[1] in EXACT for name in wrong))
    before = json.loads(given.file.read_text())
    differ = False
    for isa in isas:
        # Whoever asks for some of the cases compares them alone.
        old = before.get(isa, {})
        old = old if given.every == 1 and not given.only else {n: old.get(n) for n in found[isa]}
        differ |= bool(differences(old, found[isa], isa))
    print("some differ" if differ else "all the same")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())

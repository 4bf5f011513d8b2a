"""``fusedattn info``: what is installed here and what it will run on."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add the command ``info`` to an argparse sub-parser collection."""
    parser = subparsers.add_parser(
        "info", description="Show the version, the instruction sets, the threads and the build."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Print what this installation is and which instruction set and threads it uses."""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    lines = {
        "fusedattn": facts["version"],
        "cpu": facts["cpu"],
        "instruction sets": f"{' '.join(facts['isas'])} (built: {' '.join(facts['isas_built'])})",
        "chosen": facts["isa"],
        "threads": f"{facts['num_threads']} ({facts['parallel']})",
        "build": f"{facts['compiler']}, {facts['build_type']}",
        "python": f"{facts['python']}, NumPy {facts['numpy']}",
    }
    for name, value in lines.items():
        print(f"{name:17} {value}")
    return 0


def collect() -> dict[str, Any]:
    """Gather ``cpu_info()`` and the versions of fusedattn, Python and NumPy in one dictionary."""
    import numpy as np

    import fusedattn

    return {
        "version": fusedattn.__version__,
        **fusedattn.cpu_info(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }

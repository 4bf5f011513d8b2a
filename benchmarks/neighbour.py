"""Attention and np.matmul in turns: the same as ``fusedattn bench --neighbour``."""

import argparse
import sys
from pathlib import Path

from fusedattn.bench import neighbour

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=neighbour.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    sys.exit(neighbour.main(options.json, quick=options.quick))

"""A training step beside PyTorch's: the same as ``fusedattn bench --training``."""

import argparse
import sys
from pathlib import Path

from fusedattn.bench import training

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=training.__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample as JSON")
    options = parser.parse_args()
    sys.exit(training.main(options.json, quick=options.quick))

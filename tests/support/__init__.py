"""What tests and benchmarks share: ranks, cases that train, comparisons. It finds the example's modules for both."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The example is a folder of scripts, as a user has them; the lists of cases and the workers of ranks lie beside the tests.
for _folder in ("examples/pretrain_moe", "tests/distributed"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.append(str(ROOT / _folder))

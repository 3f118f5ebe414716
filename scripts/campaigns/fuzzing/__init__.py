"""What the fuzzers of the core share: numbered cases, the process that watches them, draws, the library with its oracles."""

import sys
from pathlib import Path

# The plain model of sequences stands with the tests.
sys.path.append(str(Path(__file__).resolve().parents[3] / "tests"))

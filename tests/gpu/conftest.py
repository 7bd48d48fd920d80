from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for folder in (TESTS / "ops", TESTS / "cuda_shim", TESTS / "runs"):
    sys.path.insert(0, str(folder))

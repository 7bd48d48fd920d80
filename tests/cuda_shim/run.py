"""Tests the CUDA kernels of some ops without a GPU and without compiling the others.

    python tests/cuda_shim/run.py ghost_norm segment_dot
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ops = sys.argv[1:]
if ops:
    os.environ["GEFFECT_FAST_SHIM_ONLY"] = ",".join(ops)
tests = Path(__file__).parents[1] / "ops" / "test_op_values.py"
names = " or ".join([*ops, "rule"]) if ops else "cuda"
chosen = f"(cuda and ({names})) or any_shape"
sys.exit(pytest.main(["-q", "--durations=5", str(tests), "-k", chosen]))

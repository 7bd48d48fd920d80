"""Tests of CUDA kernels without a GPU: `python tests/cuda_shim/run.py ghost_norm segment_dot`.

Only the files of the named ops are compiled; without a name, all are.
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

"""The benchmarks run from a clone, without installation, and measure that clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")), "step_curves"]
IMPORTED = """
import os, sys
import pydantic, rich, torch
from transformers import LlamaForCausalLM, Trainer
for script in sys.argv[2:]:
    if not os.fork():
        sys.path[0] = sys.argv[1]
        __import__(script)
        print(script, sys.modules["geffect_fast"].__file__, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{script} cannot be imported")
"""
"""Imports each script in its own process, forked after the imports that take seconds."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "geffect_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_scripts_import_the_package_beside_them(clone: Path, tmp_path: Path) -> None:
    # The clone's bytecode is kept for the next script, whatever the machine's settings.
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [sys.executable, "-c", IMPORTED, str(clone / "benchmarks"), *SCRIPTS]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == SCRIPTS
    assert all(Path(file).is_relative_to(clone) for file in found.values()), found

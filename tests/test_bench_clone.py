"""The benchmarks run from a clone, without installation, and measure that clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")), "step_curves"]
IMPORTED = """
import sys
sys.path[0] = sys.argv[1]
__import__(sys.argv[2])
print(sys.modules["geffect_fast"].__file__)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("benchmarks", "geffect_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_imports_the_package_beside_it(script: str, clone: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", IMPORTED, str(clone / "benchmarks"), script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[-1]).is_relative_to(clone)

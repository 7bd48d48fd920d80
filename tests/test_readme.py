"""README's tables are those of the committed CSVs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_generated_from_the_csvs():
    script = ROOT / "benchmarks" / "readme_table.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0

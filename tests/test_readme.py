"""README's tables are those of the committed CSVs, and what README and docs name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_generated_from_the_csvs():
    script = ROOT / "benchmarks" / "readme_table.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:tests|benchmarks|examples|tools|csrc|geffect_fast|docs)/[\w/.-]+)`", text
    )
    linked = re.findall(r"\]\(([\w./-]+)(?:#[^)]*)?\)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [link for link in linked if not (page.parent / link).exists()]
    assert missing == []

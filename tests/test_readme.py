"""README's tables are those of the committed CSVs, and its Python gives the shown output.

Files and commands that README and docs name exist.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def anchors(page):
    """The headings that a link may name after its `#`, as GitHub writes them."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_that_are_linked_are_there(page):
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([\w./-]*)#([^)]+)\)", text)
    dead = [
        f"{link}#{anchor}"
        for link, anchor in linked
        if anchor not in anchors(page.parent / link if link else page)
    ]
    assert dead == []


@pytest.mark.parametrize("page", ["README.md", "docs/guide/profile.md"])
def test_the_python_of_a_profile_gives_what_its_comments_say(study, monkeypatch, page):
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    monkeypatch.chdir(study)
    model, reference = map(AutoModelForCausalLM.from_pretrained, ("model", "reference"))
    names = {
        "model": model,
        "reference": reference,
        "tokenizer": AutoTokenizer.from_pretrained("model"),
    }
    exec(compile(block, page, "exec", dont_inherit=True), names)
    said = re.findall(r"^((?:result|layers)\..*?)  # \(([\w, ]+)\)", block, re.MULTILINE)
    assert len(said) >= 3
    for expression, dims in said:
        assert eval(expression, names).dims == tuple(dims.split(", "))

"""docs/design.md lists the parts of the package, what each may import, and files as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_imports import BASE, LAYERS, MODEL, RUN

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/design.md").read_text(encoding="utf-8")
SEVERAL = {"base": BASE, "model": MODEL, "run": RUN}
"""Words of the table of imports that stand for several parts."""


def table(head):
    """The rows of the table with this head, each a list of its cells."""
    lines = PAGE.split(f"\n{head}\n", 1)[1].splitlines()[1:]
    ends = next(i for i, line in enumerate(lines) if not line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:ends]]


def words(text):
    return set(text.replace("\n", " ").replace(",", " ").split())


def test_words_for_several_parts():
    found = re.findall(r"^- \*(\w+)\*: ((?:.+\n)(?:  .+\n)*)", PAGE, re.MULTILINE)
    assert {word: words(parts) for word, parts in found} == SEVERAL


def test_parts_and_their_imports():
    found = {}
    for name, _, imports in table("| part | is | may import |"):
        part = re.fullmatch(r"`(\w+)(?:/|\.py)`", name)[1]
        assert (ROOT / "geffect_fast" / name.strip("`")).exists()
        named = words(imports) - {"nothing"}
        found[part] = set().union(*(SEVERAL.get(word, {word}) for word in named)) - {part}
    assert found == {part: may - {part} for part, may in LAYERS.items()}
    assert list(found) == list(LAYERS)


@pytest.mark.parametrize("folder", ["capture", "engines"])
def test_files_of_a_folder(folder):
    cells = table(f"| file of `{folder}/` | holds |")
    named = [name for row in cells for name in re.findall(r"`([\w/]+\.py)`", " ".join(row))]
    inside = ROOT / "geffect_fast" / folder
    files = [str(file.relative_to(inside)) for file in inside.rglob("*.py")]
    assert sorted(named) == sorted(name for name in files if not name.endswith("__init__.py"))

"""A release states the same about itself everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import geffect_fast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import dist


def test_one_version_everywhere() -> None:
    assert dist.version() == geffect_fast.__version__
    assert dist.disagreeing() == []


def test_another_version_is_told(monkeypatch) -> None:
    monkeypatch.setattr(dist, "version", lambda: "9.9.9")
    assert [line.split()[0] for line in dist.disagreeing()] == ["CITATION.cff", "CHANGELOG.md"]

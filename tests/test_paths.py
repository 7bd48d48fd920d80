"""Folders and hub ids by short names."""

from __future__ import annotations

import pytest

from geffect_fast.paths import short_names


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["org/llama"], ["llama"]),
        (["runs/ga/", "runs/npo"], ["ga", "npo"]),
        (["runs/ga/model", "/elsewhere/npo/model/"], ["ga", "npo"]),
        (["ga/checkpoint-5", "ga/checkpoint-10"], ["checkpoint-5", "checkpoint-10"]),
        (["a/m/model", "b/m/model"], ["a", "b"]),
        (["a/model", "b/model", "c/other"], ["a/model", "b/model", "c/other"]),
        (["model", "ga/model"], ["model", "ga/model"]),
        (["/model", "/ga/model"], ["/model", "/ga/model"]),
        (["/"], ["/"]),
        ([], []),
    ],
)
def test_short_names_tell_sources_apart(sources, names):
    assert short_names(sources) == dict(zip(names, sources, strict=True))

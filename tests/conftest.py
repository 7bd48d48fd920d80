"""Fixtures that several folders share."""

from __future__ import annotations

import gc
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest


def pytest_collection_finish():
    """Freeze modules and tests: each training would look through them for garbage for a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def dataset():
    """A result with made-up numbers."""
    from synthetic import make_dataset  # needs xarray, which tests on a GPU do without

    return make_dataset()


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A folder as a user has it: a tiny model, its reference, a tokenizer, and data files."""
    import torch

    from geffect_fast.data import write_jsonl
    from geffect_fast.demo import Size, make_model, save, train_tokenizer
    from geffect_fast.demo.authors import REFUSALS, make_fictitious_authors, split_forget

    folder = tmp_path_factory.mktemp("study")
    rows = make_fictitious_authors(2, seed=3)
    forget, retain = split_forget(rows, 0.5)
    write_jsonl(forget[:4], folder / "forget.jsonl")
    write_jsonl(retain[:5], folder / "retain.jsonl")
    write_jsonl(retain[5:8], folder / "general.jsonl")
    (folder / "refusals.txt").write_text("\n".join(REFUSALS[:3]), encoding="utf-8")
    tokenizer = train_tokenizer([row["question"] + row["answer"] for row in rows], 320)
    for seed, name in ((1, "model"), (2, "reference")):
        torch.manual_seed(seed)
        model = make_model(tokenizer, Size(hidden=16, n_layers=3))
        save(model, tokenizer, folder / name)
    return folder


@pytest.fixture
def here(study, tmp_path, monkeypatch):
    """A copy of the study as the working folder, without a network."""
    folder = shutil.copytree(study, tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def tofu() -> Path:
    """The folder of the TOFU files, which the project does not contain."""
    beside = Path(__file__).resolve().parents[2] / "shared/data/tofu"
    folder = Path(os.environ.get("GEFFECT_FAST_TOFU", beside))
    if not (folder / "forget01.json").exists():
        pytest.skip("the TOFU files are not here; name their folder in GEFFECT_FAST_TOFU")
    return folder


REPORTS = ("write_report", "write_comparison_plots")


@pytest.fixture(scope="module")
def undrawn():
    """Have commands leave out tables and plots, in modules whose tests do not look at them.

    Yields a context in which commands leave them out.
    """
    from geffect_fast import report

    originals = {name: getattr(report, name) for name in REPORTS}

    @contextmanager
    def drawing():
        with pytest.MonkeyPatch.context() as patch:
            for name, original in originals.items():
                patch.setattr(report, name, original)
            yield

    with pytest.MonkeyPatch.context() as patch:
        for name in REPORTS:
            patch.setattr(report, name, lambda *_, **__: None)
        yield drawing


@pytest.fixture
def drawn(undrawn):
    """Have commands draw tables and plots again, for one test."""
    with undrawn():
        yield

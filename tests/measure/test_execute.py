"""A run from its config: choices are recorded, and settings of the process are restored."""

import pytest
import torch
import xarray as xr

from geffect_fast.arguments import make_config
from geffect_fast.errors import InputError, UnfinishedError
from geffect_fast.measure.execute import execute
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.run_yaml import load_config


def config(study, **changes):
    return make_config(
        {
            "model": str(study / "model"),
            "forget": str(study / "forget.jsonl"),
            "retain": str(study / "retain.jsonl"),
            "objectives": "ga",
        }
        | changes
    )


def test_what_was_chosen_is_recorded(study, tmp_path):
    dataset = execute(config(study), tmp_path / "run")
    saved = load_config(tmp_path / "run" / "run.yaml")
    assert saved.token_budget == dataset.attrs["token_budget"] > 0
    assert saved.threads == torch.get_num_threads()
    assert (saved.device, saved.dtype) == ("cpu", "float32")
    assert saved.rows.keys() == {"forget", "retain"}
    chosen = {"token_budget", "threads", "device", "dtype", "engine", "rows"}
    assert saved.model_dump(exclude=chosen) == config(study).model_dump(exclude=chosen)
    assert open_run(tmp_path / "run").identical(dataset)


def test_precision_and_budget_are_applied(study, tmp_path):
    wide = execute(config(study, dtype="float64", token_budget=64), tmp_path / "run")
    assert wide.attrs["dtype"] == "float64" and wide.attrs["token_budget"] == 64
    narrow = execute(config(study), tmp_path / "narrow")
    difference = abs(wide.g_effect - narrow.g_effect).max() / abs(wide.g_effect).max()
    assert 0 < float(difference) < 1e-4


def test_threads_are_applied_and_given_back(study, tmp_path, monkeypatch):
    from geffect_fast.measure import execute as module

    before, seen = torch.get_num_threads(), []

    def spy(*args, **kwargs):
        seen.append(torch.get_num_threads())
        raise InputError("stop")

    monkeypatch.setattr(module, "profile", spy)
    with pytest.raises(InputError):
        execute(config(study, threads=before + 1), tmp_path / "run")
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_the_reference_matters(study, tmp_path):
    changes = {"objectives": "npo(beta=0.1)"}
    alone = execute(config(study, **changes), tmp_path / "alone")
    against = execute(
        config(study, reference=str(study / "reference"), **changes), tmp_path / "against"
    )
    assert not (alone.g_effect == against.g_effect).all()


def test_an_alternative_in_every_row_stands_in_for_refusals(study, tmp_path):
    rows = [
        f'{{"question": "Who is {n}?", "answer": "{n} wrote.", "alternative": "I forgot."}}'
        for n in ("Ann", "Bea")
    ]
    (tmp_path / "forget.jsonl").write_text("\n".join(rows))
    dataset = execute(
        config(study, forget=str(tmp_path / "forget.jsonl"), objectives="po"), tmp_path / "run"
    )
    assert (dataset.g_effect != 0).any()


@pytest.mark.parametrize("resolve", [["sample"], ["sample", "position"]])
def test_a_failing_report_leaves_the_numbers(study, tmp_path, resolve):
    def fail(dataset, folder):
        raise RuntimeError("no ink")

    with pytest.raises(UnfinishedError, match=r"no ink; geffect-fast report .*run writes that"):
        execute(config(study, resolve=resolve), tmp_path / "run", report=fail)
    expected = execute(config(study, resolve=resolve), tmp_path / "expected")
    found = open_run(tmp_path / "run")
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"manifest.json", "results.nc", "run.yaml"}


def test_effects_by_position_are_streamed_into_the_folder(study, tmp_path, monkeypatch):
    from geffect_fast.report import write_report
    from geffect_fast.storage import stream

    opened = []
    enter = stream.EffectFile.__enter__
    monkeypatch.setattr(stream.EffectFile, "__enter__", lambda f: opened.append(f) or enter(f))
    by_sample = execute(config(study, objectives="ga,wga"), tmp_path / "samples")
    assert opened == []
    changes = {"objectives": "ga,wga", "resolve": ["parameter", "sample", "position"]}
    with execute(config(study, **changes), tmp_path / "run", report=write_report) as dataset:
        total = dataset.g_effect.sum("position")
        difference = abs(total - by_sample.g_effect).max() / abs(by_sample.g_effect).max()
        assert float(difference) < 1e-5
        assert dataset.token_text.values[0, 0] != "" and dataset.attrs["n_forget"] > 0
    assert len(opened) == 1
    held = {"manifest.json", "report.html", "results.nc", "run.yaml", "summary.csv", "plots"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == held
    assert load_config(tmp_path / "run" / "run.yaml").resolve == tuple(changes["resolve"])


def test_a_streamed_run_that_fails_leaves_nothing(study, tmp_path, monkeypatch):
    from geffect_fast.storage import stream

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.EffectFile, "__setitem__", full)
    with pytest.raises(InputError, match="No space left"):
        execute(config(study, resolve=["sample", "position"]), tmp_path / "run")
    assert not list(tmp_path.iterdir())

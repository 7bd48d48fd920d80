"""`geffect-fast evaluate --against-effects`: a study of runs, from the command to its folder."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.cli import main
from geffect_fast.data import write_jsonl
from geffect_fast.demo import save
from geffect_fast.storage.manifest import Manifest
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import UnlearnConfig

pytestmark = pytest.mark.usefixtures("undrawn")

METRICS = ["--metrics", "probability"]
OBJECTIVES = ("ga", "gd", "wga(alpha=1)", "npo(beta=0.5)", "tnpo(beta=1)")


@pytest.fixture(scope="module")
def study(tmp_path_factory, model, tokenizer, sets, undrawn):
    folder = tmp_path_factory.mktemp("against")
    save(model, tokenizer, folder / "known")
    for name in ("forget", "retain"):
        write_jsonl(sets[name], folder / f"{name}.jsonl")
    given = {"model": folder / "known", "steps": 2, "probe_every": 2, "probe_rows": 4}
    given |= {name: folder / f"{name}.jsonl" for name in ("forget", "retain")}
    given = {name: str(value) for name, value in given.items()} | {"learning_rate": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, objective in zip("abcde", OBJECTIVES, strict=True):
            config = checked_config(UnlearnConfig, given | {"objective": objective})
            execute_unlearn(config, folder / "study" / name)
        with undrawn():
            assert main(["evaluate", "--against-effects", "study", "--out", "run", *METRICS]) == 0
    return folder


@pytest.fixture
def here(study, monkeypatch):
    monkeypatch.chdir(study)
    return study


@pytest.mark.slow
def test_the_models_before_and_after_are_measured(here, model, tokenizer, sets):
    found = gf.open_evaluation("run")
    assert found["model"].values.tolist() == ["original", *"abcde"]
    own = gf.evaluate(
        model, tokenizer, forget=sets["forget"], retain=sets["retain"], metrics="probability"
    )
    np.testing.assert_allclose(found.value.sel(model="original"), own.value, rtol=1e-6)
    of_a = gf.open_run("study/a")
    e_u = of_a.g_effect.isel(step=0, objective=0).sel(risk="unlearn").sum()
    assert float(found.effect.sel(run="a", predictor="e_u")) == pytest.approx(float(e_u), rel=1e-12)
    changed = found.change.sel(run="a", metric="probability", set="forget")
    before, after = found.value.sel(model=["original", "a"], metric="probability", set="forget")
    assert float(changed) == float(after - before) < 0


def test_the_folder_holds_tables_and_a_figure_and_knows_them(here):
    with (here / "run/against_effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = gf.open_evaluation("run")
    assert {row["predictor"] for row in rows} == {*found["predictor"].values.tolist()}
    assert len(rows) == found.sizes["predictor"] * 2
    for row in rows:
        at = {name: row[name] for name in ("predictor", "metric", "set")}
        assert float(row["spearman"] or "nan") == pytest.approx(
            float(found.spearman.sel(at)), nan_ok=True
        )
    with (here / "run/runs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["objective"] for row in table] == [*OBJECTIVES]
    held = Manifest.read(here / "run")
    assert held is not None
    assert {"runs.csv", "against_effects.csv", "plots/against_effects.png"} <= held.files.keys()
    assert any(name.endswith("a, effects") for name in held.inputs)


def test_it_is_printed_and_shown_again(here, capsys):
    assert main(["show", "run"]) == 0
    printed = capsys.readouterr().out
    assert "effects at the original model beside what unlearning did" in printed
    assert "rank correlations over 5 runs" in printed
    assert "are told from chance" in printed


def test_its_run_yaml_replays_it(here, tmp_path):
    command = ["evaluate", "--config", "run/run.yaml", "--out", str(tmp_path / "again"), "--quiet"]
    assert main(command) == 0
    one, two = gf.open_evaluation("run"), gf.open_evaluation(tmp_path / "again")
    for name in ("value", "effect", "change", "spearman", "kendall_low", "p_value"):
        assert one[name].values.tobytes() == two[name].values.tobytes(), name


def test_data_that_are_given_count(here, tmp_path, sets):
    write_jsonl(sets["retain"][:3], tmp_path / "few.jsonl")
    runs = ["--against-effects", "study/a", "study/b", "--retain", str(tmp_path / "few.jsonl")]
    assert main(["evaluate", *runs, *METRICS, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    found = gf.open_evaluation(tmp_path / "run")
    assert (found["sample_set"] == "retain").sum() == 3
    assert found.spearman.isnull().all()


def another_model(folder):
    config = folder / "study/b/run.yaml"
    config.write_text(config.read_text().replace("/known", "/elsewhere"))


def without(name):
    def gone(folder):
        place = folder / "study/b" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return gone


def renamed(folder):
    (folder / "study/b").rename(folder / "study/original")


REFUSED = {
    "a model of another": (another_model, ["study"], "give runs from one model"),
    "no model": (without("model"), ["study"], "holds no model"),
    "no result": (without("results.nc"), ["study/a", "study/b"], "study/b"),
    "no run": (without("run.yaml"), ["study"], "is not a run of geffect-fast unlearn"),
    "called original": (renamed, ["study"], "rename its folder"),
    "one run": (lambda _: None, ["study/a"], "give two or more"),
    "a run twice": (lambda _: None, ["study/a", "study/a"], "listed twice"),
    "a folder of no runs": (lambda folder: (folder / "no").mkdir(), ["no"], "holds no runs"),
    "models as well": (lambda _: None, ["study", "--models", "known"], "give exactly one of"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_runs_that_cannot_be_set_side_by_side_are_refused(
    study, tmp_path, monkeypatch, capsys, wrong
):
    breaks, runs, message = REFUSED[wrong]
    here = shutil.copytree(study, tmp_path / "here")
    for config in here.glob("study/*/run.yaml"):
        config.write_text(config.read_text().replace(str(study), str(here)))
    monkeypatch.chdir(here)
    breaks(here)
    assert main(["evaluate", "--out", "new", "--quiet", "--against-effects", *runs]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (here / "new").exists()

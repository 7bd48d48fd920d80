"""`geffect-fast sweep`: its run folder, its replay, and the ways to give objectives."""

from __future__ import annotations

import pandas as pd
import pytest
import xarray as xr
from bad_input.case import profile

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.run_yaml import dump_config, load_config

pytestmark = pytest.mark.usefixtures("undrawn")

SWEPT = ["wga(alpha=1:2:3)", "npo(beta=0.1:10:2,log) + 0.5*kl", "ga"]


@pytest.fixture(scope="module")
def words(study):
    """A sweep's command line without its objectives and its folder."""
    files = {"model": "model", "reference": "reference", "refusals": "refusals.txt"}
    files |= {"forget": "forget.jsonl", "retain": "retain.jsonl"}
    paths = {name: str(study / file) for name, file in files.items()}
    return ["sweep", *profile(**paths, objectives=None, out=None)[2:]]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory, undrawn):
    out = tmp_path_factory.mktemp("finished") / "run"
    with undrawn():
        assert main([*words, "--quiet", "--out", str(out), "--objectives", *SWEPT]) == 0
    return out


def test_a_run_folder_is_that_of_a_profile_and_more(finished):
    held = {"manifest.json", "report.html", "results.nc", "run.yaml", "summary.csv", "plots"}
    assert {path.name for path in finished.iterdir()} == held
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots == {"sweep.png", "pareto.png", "instances.png"}
    table = pd.read_csv(finished / "summary.csv")
    assert list(table.hyper_alpha[:3]) == [1, 1.5, 2] and list(table.hyper_beta[3:5]) == [0.1, 10]
    assert list(table.sweep.unique()) == SWEPT
    saved = load_config(finished / "run.yaml")
    assert saved.command == "sweep" and list(saved.objectives) == SWEPT
    assert saved.resolve == ("sample",) and saved.token_budget


def test_its_result_is_that_of_gf_sweep(finished, study):
    from geffect_fast.measure.models import load_model, load_tokenizer

    there = open_run(finished)
    here = gf.sweep(
        load_model(study / "model"),
        load_tokenizer(study / "model"),
        forget=study / "forget.jsonl",
        retain=study / "retain.jsonl",
        refusals=study / "refusals.txt",
        reference_model=study / "reference",
        objectives=SWEPT,
        engine=there.attrs["engine"],
        token_budget=there.attrs["token_budget"],
    )
    assert there.pareto.dtype == bool
    xr.testing.assert_allclose(there, here, rtol=1e-6)
    assert there.attrs["sweeps"] == here.attrs["sweeps"]


def test_run_yaml_replays_to_the_same_bits(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--config", str(finished / "run.yaml"), "--out", "again", "-q"]) == 0
    first, again = open_run(finished), open_run(tmp_path / "again")
    assert set(first.variables) == set(again.variables)
    for name in first.variables:
        assert first[name].values.tobytes() == again[name].values.tobytes(), name
    assert (tmp_path / "again/run.yaml").read_text() == (finished / "run.yaml").read_text()
    assert (finished / "run.yaml").read_text().startswith("# Replay: geffect-fast sweep --config")


@pytest.fixture
def taken(finished, monkeypatch):
    """The configs of runs that are replaced by a finished run."""
    configs = []

    def note(config, *_args, **_kwargs):
        configs.append(config)
        return open_run(finished)

    monkeypatch.setattr("geffect_fast.measure.execute.execute", note)
    return configs


@pytest.mark.parametrize(
    "ways",
    [
        ["--objectives", ",".join(SWEPT)],
        [*(word for text in SWEPT for word in ("--objectives", text))],
        ["--objectives", SWEPT[0], "--threads", "1", *SWEPT[1:]],
        SWEPT,
    ],
    ids=["commas", "repeated", "apart", "without the option"],
)
def test_objectives_are_taken_in_several_ways(words, ways, taken):
    assert main([*words, *ways, "--out", "run", "--quiet"]) == 0
    assert list(taken[0].objectives) == SWEPT and taken[0].command == "sweep"


@pytest.mark.usefixtures("drawn")
def test_a_loud_sweep_prints_what_show_prints_again(words, finished, taken, capsys):
    assert main([*words, "--out", str(finished), *SWEPT]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "6 objectives on 4 forget rows: the best of each family",
        "strongest removal",
        "least harm",
        "Pareto front: ",
        "(below 0: it rises, as wanted)",
        "plots/pareto.png",
        "plots/sweep.png",
        "How to read the signs",
    ):
        assert expected in printed, expected
    assert main(["show", str(finished)]) == 0
    assert capsys.readouterr().out == printed


def test_export_has_the_values(finished, tmp_path):
    assert main(["export", str(finished), "--to", str(tmp_path / "all.csv")]) == 0
    table = pd.read_csv(tmp_path / "all.csv")
    assert len(table) == open_run(finished).g_effect.size
    values = table[table.objective == "wga(alpha=1.5)"]
    assert set(values.hyper_alpha) == {1.5} and set(values.sweep) == {"wga(alpha=1:2:3)"}


def test_the_config_of_a_profile_is_swept_and_options_override(finished, taken, tmp_path):
    profiled = load_config(finished / "run.yaml").model_copy(
        update={"command": "profile", "objectives": ("ga", "po"), "resolve": ("group",)}
    )
    (tmp_path / "run.yaml").write_text(dump_config(profiled))
    more = ["sweep", "--config", str(tmp_path / "run.yaml"), "-q", "--out", "run"]
    assert main(more) == 0
    assert main([*more, "wga(1:2:2)", "--resolve", "sample"]) == 0
    assert taken == [
        profiled.model_copy(update={"command": "sweep"} | changes)
        for changes in ({}, {"objectives": ("wga(1:2:2)",), "resolve": ("sample",)})
    ]


GOOD = {"model": "a/b", "forget": "c/d", "retain": "e/f"}


def test_configs_of_sweeps_keep_ranges_and_resolve_samples():
    config = make_config(GOOD | {"command": "sweep", "objectives": "wga( 1:2:3 ) , NPO(0.10)"})
    assert config.objectives == ("wga( 1:2:3 )", "npo(beta=0.1)")
    assert config.resolve == ("sample",)
    explicit = make_config(GOOD | {"command": "sweep", "objectives": "ga", "resolve": ["group"]})
    assert explicit.resolve == ("group",)
    assert make_config(GOOD | {"objectives": "ga"}).command == "profile"

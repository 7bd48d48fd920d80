"""The demo with tiny settings: it learns, unlearns a little, profiles, and its run.yaml replays."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from geffect_fast.cli import main
from geffect_fast.data import read_rows, tokenize_rows
from geffect_fast.demo import (
    ASKED,
    MEASURES,
    METRICS,
    OBJECTIVES,
    PAGE,
    PARTS,
    STEPS,
    SWEEP,
    Size,
    recall,
    run_demo,
)
from geffect_fast.errors import GEffectError, InputError
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.storage.evaluation import open_evaluation
from geffect_fast.storage.run_folder import open_run

pytestmark = pytest.mark.slow

TINY = Size(
    n_authors=2, vocab_size=400, hidden=48, n_layers=2, known=0.5, max_epochs=300, n_updates=6
)


UNLEARNED = {"ga": "ga", "npo": "npo(beta=0.1)"}
RANGES = ("ga", "wga(alpha=0.1:7:3)", "npo(beta=0.01:4:3,log)")
"""Fewer ranges than those of `make demo`."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of a finished demo and its output; the demo leaves the random state as it was."""
    out = tmp_path_factory.mktemp("demo") / "run"
    state = torch.random.get_rng_state()
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(said),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("geffect_fast.demo.UNLEARNED", UNLEARNED)
        patch.setattr("geffect_fast.demo.RANGES", RANGES)
        run_demo(out, size=TINY)
    assert torch.equal(torch.random.get_rng_state(), state)
    return out, said.getvalue()


@pytest.fixture
def done(told):
    return told[0]


def known(folder, model, data):
    tokenizer = load_tokenizer(folder / model)
    rows = read_rows(folder / data, name=data)
    return recall(load_model(folder / model), tokenize_rows(rows, tokenizer, name=data))


def test_everything_a_user_would_have_is_there(done):
    names = {path.name for path in done.iterdir()}
    assert names == {*PARTS, "report.html", "results.nc", "run.yaml", "summary.csv", "plots"} | {
        "manifest.json"
    }
    rows = [json.loads(line) for line in (done / "forget.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all(row["question"] and row["answer"] for row in rows)
    assert len(read_rows(done / "retain.jsonl", name="retain")) == 10


def test_the_reference_knows_its_data_and_the_model_begins_to_forget(done):
    reference = known(done, "reference", "forget.jsonl")
    assert reference[1] >= TINY.known and known(done, "reference", "retain.jsonl")[1] >= TINY.known
    assert known(done, "model", "forget.jsonl")[0] < 0.96 * reference[0]


def test_the_run_profiles_at_least_eight_objectives_against_both_risks(done):
    dataset = open_run(done)
    assert list(dataset.objective.values) == list(OBJECTIVES) and len(OBJECTIVES) >= 8
    assert list(dataset.risk.values) == ["unlearn", "retain"]
    assert dataset.g_effect.dims == ("objective", "risk", "parameter", "sample")
    total = dataset.g_effect.sum(["parameter", "sample"])
    assert float(total.sel(objective="ga", risk="unlearn")) == pytest.approx(
        -(float(dataset.risk_grad_norm.sel(risk="unlearn")) ** 2), rel=1e-4
    )


def test_it_sweeps_hyper_parameters_token_by_token(done):
    profiled, swept = open_run(done), open_run(done / SWEEP)
    assert swept.attrs["engine"] == "forward" and swept.sizes["objective"] == 1 + 3 + 3
    assert swept.g_effect.dims == ("objective", "risk", "sample", "token")
    for result in (profiled, swept):
        assert not result.g_effect.isnull().any()
    both = profiled.g_effect.sum("parameter"), swept.g_effect.sum("token")
    one, other = (e.sel(objective="ga")[:, (e.set == "forget").values].values for e in both)
    assert one == pytest.approx(other, rel=1e-4, abs=1e-5 * abs(one).max())
    assert (done / SWEEP / "tokens.html").is_file()


@pytest.mark.parametrize(("command", "run"), [("profile", "."), ("sweep", SWEEP)])
def test_run_yaml_replays_it(done, tmp_path, monkeypatch, command, run):
    monkeypatch.setattr("geffect_fast.report.write_report", lambda *_: None)
    config, out = done / run / "run.yaml", tmp_path / "again"
    assert main([command, "--config", str(config), "--out", str(out), "-q"]) == 0
    again = open_run(out).g_effect.values
    assert again.tobytes() == open_run(done / run).g_effect.values.tobytes()


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path, monkeypatch):
    """The profile's numbers depend on the data, the training and the first steps of unlearning."""
    for later in ("write_report", "write_page", "_unlearn", "_measure"):
        monkeypatch.setattr(f"geffect_fast.demo.{later}", lambda *_: None)
    monkeypatch.setattr("geffect_fast.demo.RANGES", ("ga",))
    hasty = replace(TINY, known=0.0)
    one, two, other = (
        run_demo(tmp_path / name, seed=seed, size=hasty, progress=False).g_effect.values
        for name, seed in (("one", 5), ("two", 5), ("other", 6))
    )
    assert one.tobytes() == two.tobytes()
    assert not (one == other).all()


def test_a_folder_in_use_is_refused_before_any_work(done, tmp_path):
    with pytest.raises(InputError, match="already holds"):
        run_demo(done, size=TINY)
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="already holds model"):
        run_demo(tmp_path, size=TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_does_not_learn_is_said_so(tmp_path):
    with pytest.raises(GEffectError, match="did not learn"):
        run_demo(
            tmp_path / "run",
            size=Size(n_authors=2, vocab_size=300, hidden=16, n_layers=2, max_epochs=1),
            progress=False,
        )


def test_it_says_what_happens(told):
    for words in (
        "20 questions about 2 invented authors",
        "knows them by heart",
        "is the reference",
    ):
        assert words in told[1]
    assert told[1].count("forget: 10 rows of ") == 1  # every one of the demo's runs has it


def test_unlearning_raises_the_risk_of_what_must_go_as_predicted(done):
    for name, objective in UNLEARNED.items():
        with open_run(done / STEPS / name) as run:
            assert run.attrs["trained_objective"] == objective
            forget = run.sel(risk="unlearn")
        change, predicted = forget.measured_change.values[1:], forget.predicted_update.values[1:]
        assert len(change) >= 3 and forget.risk_value.values[-1] > forget.risk_value.values[0]
        assert (np.sign(change) == np.sign(predicted)).all() and change[0] > 0, name
    page = (done / STEPS / PAGE).read_text(encoding="utf-8")
    assert all(objective in page for objective in UNLEARNED.values())


def test_what_unlearning_did_stands_beside_the_effects_before(done):
    found = open_evaluation(done / MEASURES)
    assert found["run"].values.tolist() == [*UNLEARNED]
    assert found["objective"].values.tolist() == [*UNLEARNED.values()]
    assert found["metric"].values.tolist() == [*METRICS]
    before = known(done, "reference", "forget.jsonl")[0]
    assert before > 0.5
    for name in UNLEARNED:
        with open_run(done / STEPS / name) as run:
            effect = run.g_effect.isel(step=0, objective=0).sum(["parameter", "sample"])
        for risk, predictor in (("unlearn", "e_u"), ("retain", "e_r")):
            own = float(found.effect.sel(run=name, predictor=predictor))
            assert own == pytest.approx(float(effect.sel(risk=risk)), rel=1e-12)
        assert float(found.change.sel(run=name, metric="probability", set="forget")) < 0
    asked = read_rows(done / ASKED, name="asked")
    assert json.loads(found.attrs["n_rows"]) == {"forget": 10, "retain": len(asked)}


def test_the_table_is_the_last_that_the_command_prints(done, monkeypatch, capsys):
    monkeypatch.setattr("geffect_fast.demo.run_demo", lambda *_, **__: open_run(done))
    assert main(["demo", "--out", str(done)]) == 0
    last = capsys.readouterr().out.rpartition("step by step:")[2]
    assert "effects at the original model beside what unlearning did" in last
    for word in ("original", *UNLEARNED, "e_u", "e_r", "collateral"):
        assert word in last

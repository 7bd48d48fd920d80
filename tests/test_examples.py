"""The examples run from top to bottom, and what their texts say is what they find."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch

import geffect_fast as gf
from geffect_fast.data import read_rows, write_jsonl
from geffect_fast.demo import make_fictitious_authors

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def found() -> dict:
    """What the script leaves behind."""
    return runpy.run_path(str(EXAMPLES / "unlearning_loop.py"))


def test_all_ways_to_resolve_the_effect_add_up_to_it(found: dict) -> None:
    shares, pairs, by_group = found["shares"], found["pairs"], found["by_group"]
    rounding = 1e-5 * float(shares.abs().sum())
    by_pairs = pairs.mean(1) / len(found["forget_rows"])
    assert float((by_pairs - shares).abs().max()) < rounding
    assert abs(float(by_group.sum()) - float(shares.sum())) < rounding


def test_first_order_is_right_for_small_steps_and_too_low_for_large_ones(found: dict) -> None:
    ratios = {lr: measured / predicted for lr, (predicted, measured) in found["changes"].items()}
    assert all(abs(ratios[lr] - 1) < 0.1 for lr in (0.001, 0.003, 0.01))
    assert ratios[0.1] > 1.2


def test_pairs_find_the_stray_and_the_same_fact(found: dict) -> None:
    assert found["most_hurt"][found["STRAY"]] == found["TWIN"]
    assert found["first"] == found["STRAY"]
    assert found["second"] == found["TWIN"], "the row that asks for the twin's fact"
    assert found["n_same"] > found["STRAY"] / 2


def test_harm_is_done_in_the_first_layers(found: dict) -> None:
    by_group = dict(zip(found["labels"], found["by_group"].tolist(), strict=True))
    assert min(by_group, key=by_group.__getitem__) == "layer 0 self_attn"
    assert by_group["head"] > 0


def test_acting_forgets_as_much_for_half_the_harm(found: dict) -> None:
    risks, (_, retained_before, twin_before) = found["risks"], found["risks"]["before"]
    harm = {name: retained - retained_before for name, (_, retained, _) in risks.items()}
    for name in ("as it is", "without the stray", "acting as well"):
        assert risks[name][0] > found["ENOUGH"]
    assert harm["acting as well"] < 0.5 * harm["as it is"]
    assert harm["without the stray"] > 0.8 * harm["as it is"]
    assert risks["without the stray"][2] - twin_before > 0.5, "the twin is not saved by that"


def test_a_trainer_is_watched_with_three_lines() -> None:
    found = runpy.run_path(str(EXAMPLES / "trainer_callback.py"))
    result, effects = found["result"], found["effects"]
    assert result.step.values.tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert (effects.sel(objective="ga", risk="unlearn") < 0).all()
    by_ga, by_wga = (effects.sel(objective=name, risk="retain") for name in result.objective.values)
    assert (by_ga.values < by_wga.values).all() and (by_wga < 0).all(), "wga harms less"
    assert (result.risk_value.diff("step") > 0).all()
    assert found["agreement"] > 0.95
    assert float(found["weights"][-1]) < float(found["weights"][0]), "what is forgotten is spared"


def test_a_study_sets_what_unlearning_did_beside_effects_before(tmp_path, monkeypatch, capsys):
    """Made tiny: invented rows, a Llama of an epoch, three objectives, one metric."""
    tofu, work = tmp_path / "tofu", tmp_path / "study"
    tofu.mkdir()
    rows = make_fictitious_authors(3, seed=0)
    files = ("forget05_perturbed.json", "retain_perturbed.json", "retain95.json")
    for file, of in zip(files, (rows[:10], rows[10:20], rows[10:]), strict=True):
        write_jsonl(of, tofu / file)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("machine.RESULTS", tmp_path)
    given = {"steps": 2, "rate": 1e-3, "runs": 3, "forget": 6, "retain": 8, "probed": 4}
    given |= {"holdout": 5, "hidden": 32, "known": 0, "metrics": "probability", "csv": "found"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["does_e_predict.py", str(tofu), "--work", str(work), *words])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(EXAMPLES / "does_e_predict.py"), run_name="__main__")
    assert "0 of 0 pairs are told from chance" in capsys.readouterr().out, "three runs say nothing"

    learned = {row["question"] for row in [*rows[:6], *rows[10:18]]}
    asked = {row["question"] for row in read_rows(work / "holdout.jsonl", name="holdout")}
    assert len(asked) == 5 and not asked & learned, "nothing is trained on the hold-out"

    found = gf.open_evaluation(work / "measures")
    assert found["objective"].values.tolist() == ["ga", "gd", "ga + kl"]
    assert found["metric"].values.tolist() == ["probability"]
    e_u = found.effect.sel(predictor="e_u").values
    assert (e_u < 0).all() and e_u[0] == pytest.approx(e_u[2], rel=1e-4), "kl is 0 at the start"
    assert (found.change.sel(set="forget") < 0).all()
    with (tmp_path / "found_runs.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["objective"] for row in table] == found["objective"].values.tolist()
    assert [float(row["e_u"]) for row in table] == pytest.approx(e_u, rel=1e-12)
    assert all(row["commit"] and row["cpu"] for row in table)

"""The examples run from top to bottom, and their texts state what they find."""

from __future__ import annotations

import csv
import os
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import geffect_fast as gf
from geffect_fast.data import read_rows, write_jsonl
from geffect_fast.demo import make_fictitious_authors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def found() -> dict:
    """The variables that the script leaves behind."""
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


def test_a_notebook_shows_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gf.__file__).parents[1]), prepend=os.pathsep)
    book = nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "as it is committed"
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"], "no warning"
    summary, layers, instances, tokens, by_group, by_set, checked, page = (
        output.data for output in outputs if output.output_type == "execute_result"
    )
    assert "forgets" in summary["text/html"] and "forgets" in summary["text/plain"]
    assert "image/png" in layers and "image/png" in instances
    assert "Tokens of 2 of 10 forget rows under ga" in tokens["text/html"]
    assert "embedding" in by_group["text/html"] and "forget" in by_set["text/html"]
    assert "<table" in checked["text/html"] and "\nExact: all " in checked["text/plain"]
    assert "first_look.html" in page["text/plain"]
    assert "Unlearning objectives" in (tmp_path / "first_look.html").read_text(encoding="utf-8")
    bars = book.metadata.widgets["application/vnd.jupyter.widget-state+json"].state.values()
    drawn = [bar.state.outputs[-1].data["text/plain"] for bar in bars if "outputs" in bar.state]
    assert "gradients of the risks" in drawn[0] and all("━━━" in bar for bar in drawn)


@pytest.fixture
def studied(tmp_path, monkeypatch):
    """Run a study on TOFU, made tiny: invented rows, a Llama of an epoch, three runs, one metric.

    Returns the folder of the study and the invented rows.
    """
    rows = make_fictitious_authors(3, seed=0)

    def run(script, **more):
        tofu, work = tmp_path / "tofu", tmp_path / "study"
        tofu.mkdir()
        files = ("forget05_perturbed.json", "retain_perturbed.json", "retain95.json")
        for file, of in zip(files, (rows[:10], rows[10:20], rows[10:]), strict=True):
            write_jsonl(of, tofu / file)
        for folder in ("benchmarks", "examples"):
            monkeypatch.syspath_prepend(str(ROOT / folder))
        monkeypatch.setattr("machine.RESULTS", tmp_path)
        given = {"steps": 2, "rate": 1e-3, "runs": 3, "forget": 6, "retain": 8, "probed": 4}
        given |= {"holdout": 5, "hidden": 32, "known": 0, "csv": "found"} | more
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [script, str(tofu), "--work", str(work), *words])
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return work, rows

    return run


def table_of(file):
    """The rows of a CSV, all of which name the machine."""
    with file.open(encoding="utf-8") as opened:
        table = list(csv.DictReader(opened))
    assert all(row["commit"] and row["cpu"] for row in table)
    return table


def test_a_study_sets_what_unlearning_did_beside_effects_before(studied, tmp_path, capsys):
    work, rows = studied("does_e_predict.py", metrics="probability")
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
    table = table_of(tmp_path / "found_runs.csv")
    assert [row["objective"] for row in table] == found["objective"].values.tolist()
    assert [float(row["e_u"]) for row in table] == pytest.approx(e_u, rel=1e-12)


def test_a_study_compares_update_rules_at_equal_retention(studied, tmp_path):
    work, _ = studied("update_rules.py", runs=2)
    table = table_of(tmp_path / "found.csv")
    assert [(row["objective"], row["update"]) for row in table] == [
        ("ga + nll", rule) for rule in ("sgd", "orthograd")
    ]
    for name in ("e_forget", "e_P_forget", "e_retain", "e_P_retain"):
        of = [float(row[name]) for row in table]
        assert of == pytest.approx([of[0]] * 2, rel=1e-4), "the objective and the model are one"
    assert float(table[0]["e_forget"]) != float(table[0]["e_P_forget"])
    assert len({row["change_forget"] for row in table}) == 2, "the rules are not"
    controlled = gf.open_evaluation(work / "control")
    original = float(controlled.retention.sel(alpha=0).isel(model=0))
    for row in table:
        assert 0 <= float(row["share"]) <= 1 and float(row["retain"]) >= 0.95 * original - 1e-6

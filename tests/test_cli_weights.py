"""`geffect-fast weights`: from a run to data with weights, and a profile of them."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from models import fp64_throughout
from rich.console import Console
from token_results import drawn_shares, token_result

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.report.tables.weights import reached, render_weights

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """A study with a finished run by token, in fp64."""
    here = tmp_path_factory.mktemp("weights")
    for name in ("forget.jsonl", "retain.jsonl"):
        shutil.copy(study / name, here)
    profiled(study, here, "forget.jsonl", "run", "ga,wga(alpha=1),gd", "sample,token")
    return here


def profiled(study, here, forget, out, objectives, resolve, engine="auto"):
    """A run of the study's model on data in the folder, in fp64."""
    options = {
        "model": study / "model",
        "forget": here / forget,
        "retain": here / "retain.jsonl",
        "objectives": objectives,
        "resolve": resolve,
        "engine": engine,
        "dtype": "float64",
        "threads": 1,
        "out": here / out,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with fp64_throughout():
        assert main(["profile", "--quiet", *words]) == 0


def test_a_run_gives_weights_that_a_profile_confirms(folder, study, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["weights", "run", "--retain-budget", "0", "--out", "best.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert printed.split()[-2:] == ["best.jsonl", "frontier.png"]
    best = gf.optimal_weights(gf.open_run("run"), retain_budget=0)
    assert reached(best) in printed and best.e_u < 0
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (folder / "best.jsonl").read_text().splitlines()]
    assert [row["weights"] for row in rows] == [
        w[~np.isnan(w)].tolist() for w in best.weight.values
    ]
    profiled(study, folder, "best.jsonl", "again", "token_weights", "sample", "reverse")
    found = gf.open_run("again").g_effect.sel(objective="token_weights").sum("sample")
    expected = [float(best.e_u), float(best.e_r)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * abs(expected[0]))


def test_a_removal_and_files_that_are_replaced(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "best.jsonl").write_text("an earlier one")
    shutil.move("forget.jsonl", "moved.jsonl")
    ga = float(gf.open_run("run").g_effect.sel(objective="ga", risk="unlearn").sum())
    words = [
        "weights",
        "run/results.nc",
        "--removal",
        str(ga / 2),
        "--max-weight",
        "2",
        "--forget",
        "moved.jsonl",
        "--out",
        "best.jsonl",
        "--overwrite",
        "--quiet",
    ]
    try:
        assert main(words) == 0
    finally:
        shutil.move("moved.jsonl", "forget.jsonl")
    assert capsys.readouterr() == ("", "")
    rows = [json.loads(line) for line in (folder / "best.jsonl").read_text().splitlines()]
    weights = np.concatenate([row["weights"] for row in rows])
    assert set(weights[(weights != 0) & (weights != 2)].shape) <= {0, 1}
    assert (weights == 2).any() and (weights == 0).any()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def rendered(best):
    printed = io.StringIO()
    Console(width=120, file=printed).print(render_weights(best))
    return printed.getvalue()


def test_what_is_printed_compares_with_ga():
    shares = np.array([[-3.0, -1.0, 1.0, -0.5], [-1.0, -1.0, 0.5, 0.25]])
    best = gf.optimal_weights(token_result([shares]), retain_budget=0.5)
    assert reached(best) == "The best weights keep 85.7 % of ga's removal and 40.0 % of its harm."
    text = rendered(best)
    assert "Token weights from 0 to 1: most removal for e_r ≥ -0.5\n" in text
    assert "Of 4 tokens, 2 have weight 1, 1 have weight 0, 1 lies between" in text
    assert "An e_r lower by one would buy an e_u lower by 2." in text
    spared, full = text.split("Spared (weight 0)")[1].split("In full (weight 1)")
    first = [line.split()[0] for line in full.splitlines() if "Who is author 0?" in line]
    assert first == [".", "lives"]
    assert spared.count("Who is author 0?") == 1 and "Mara" in spared


def test_what_rounding_leaves_of_zero_is_printed_as_zero():
    """Harm and its repair add up to zero but for a last digit; a token's share is as small."""
    shares = np.array([[-3.0, -1.0, 1.0, -1e-18], [-0.1, -0.2, 0.3, 1e-20]])
    best = gf.optimal_weights(token_result([shares]), retain_budget=0)
    best["e_r"] = 0 * best["e_r"] - 6e-17
    assert "e-" not in rendered(best) and "none of its harm" in reached(best)
    best["e_r"] -= 1e-9
    assert "-1e-09" in rendered(best) and "– of its harm" in reached(best)


def test_what_is_printed_where_ga_does_no_damage_or_no_removal():
    helps = token_result([np.array([[-3.0, -1.0], [0.5, 0.25]])])
    best = gf.optimal_weights(helps, retain_budget=0)
    assert reached(best) == "The best weights keep 100.0 % of ga's removal and none of its harm."
    assert "A lower e_r would buy no lower e_u" in rendered(best)
    none = gf.optimal_weights(token_result([np.array([[3.0], [-0.5]])]), retain_budget=1)
    assert reached(none) == "The best weights keep – of ga's removal and none of its harm."
    mixed = token_result([np.array([[-3.0, 1.0], [-0.5, 1.0]])])
    paid = gf.optimal_weights(mixed, retain_budget=0.5)
    assert reached(paid) == "The best weights keep 150.0 % of ga's removal and – of its harm."
    bare = gf.optimal_weights(
        token_result(drawn_shares([3])).drop_vars("token_text"), removal=-1e-4
    )
    assert "⟨5⟩" in rendered(bare)

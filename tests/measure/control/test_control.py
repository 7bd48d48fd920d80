"""`gf.control` and `geffect-fast control`: mixtures, the search, methods at equal retention."""

from __future__ import annotations

import copy
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from bad_input.case import snapshot
from control_models import (
    ASKED,
    COMMAND,
    FORGET,
    RETAIN,
    TAUS,
    by_hand,
    retention,
)
from evaluated import losses
from loaded_models import watch_models
from report_views import text_of

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.measure.control import largest_alpha
from geffect_fast.measure.models import load_model

pytestmark = pytest.mark.usefixtures("undrawn")

# ---- the search ----

CURVES = {
    "straight": lambda a: 1 - a,
    "early fall": lambda a: math.exp(-30 * a),
    "late fall": lambda a: 1 - a**20,
    "steps": lambda a: math.floor(8 * (1 - a)) / 8 + 0.25,
    "nothing lost": lambda a: 1 - 1e-9 * a,
    "rises again": lambda a: 0.7 + 0.3 * math.cos(12 * a) - 0.1 * a,
}


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("tolerance", [0.05, 1e-3])
@pytest.mark.parametrize("name", CURVES)
def test_the_alpha_is_the_best_point_of_a_fine_grid(name, tolerance, tau):
    kept = CURVES[name]
    found = largest_alpha(kept, tau, 40, tolerance)
    fine = [k / 20_000 for k in range(20_001)]
    best = max(a for a in fine if kept(a) >= tau * kept(0))
    assert kept(found.alpha) >= tau * kept(0)
    assert best - tolerance <= found.alpha <= best + 1 / 20_000
    if found.alpha < 1:
        assert kept(found.lost) < tau * kept(0)
        assert found.lost - found.alpha <= tolerance
    else:
        assert math.isnan(found.lost)
    assert found.monotone == (name != "rises again")


def test_each_alpha_is_measured_once_and_no_more_than_needed():
    asked = []

    def kept(alpha):
        asked.append(alpha)
        return 1 - alpha

    largest_alpha(kept, 0.95, 10, 0.01)
    assert len(asked) == len(set(asked)) == 11 + math.ceil(math.log2(0.1 / 0.01))


# ---- the whole ----


def test_methods_are_measured_where_each_keeps_enough(
    result, original, unlearned, gentler, tokenizer
):
    own = retention(original, tokenizer, "probability")
    assert result.sizes["model"] == 2 and result["model"].values.tolist() == ["ascent", "gentler"]
    for name, model in (("ascent", unlearned), ("gentler", gentler)):
        of = result.sel(model=name)
        share, lost = float(of.alpha_chosen), float(of.alpha_lost)
        assert 0 < share < 1 and lost - share <= 1 / 64
        at = by_hand(original, model, share)
        kept = retention(at, tokenizer, "probability")
        assert float(of.retention.sel(alpha=share)) == pytest.approx(kept, rel=1e-4)
        assert kept >= 0.8 * own * (1 - 1e-4)
        beyond = retention(by_hand(original, model, lost), tokenizer, "probability")
        assert beyond < 0.8 * own * (1 + 1e-4)
        expected = gf.evaluate(at, tokenizer, forget=FORGET, retain=RETAIN)
        np.testing.assert_allclose(of.value, expected.value, rtol=1e-3)
        np.testing.assert_allclose(of.value_low, expected.value_low, rtol=1e-2)
        whole = gf.evaluate(model, tokenizer, forget=FORGET, retain=RETAIN)
        np.testing.assert_array_equal(of.unlearned_value, whole.value)
        there = of.retention.sel(alpha=[0.0, 1.0])
        assert there.values.tolist() == [own, retention(model, tokenizer, "probability")]
    first = gf.evaluate(original, tokenizer, forget=FORGET, retain=RETAIN)
    np.testing.assert_array_equal(result.original_value, first.value)
    assert result.on_grid.sum() == 9
    assert result.retention.sel(alpha=result.on_grid).notnull().all()
    low, high = (result[f"retention_{end}"] for end in ("low", "high"))
    known = result.retention.notnull()
    assert ((low <= result.retention) & (result.retention <= high)).where(known, True).all()


def test_the_share_found_is_the_best_of_a_fine_grid(result, original, unlearned, tokenizer):
    def kept(model):
        return np.exp(-losses(model, tokenizer, RETAIN)).mean()

    def keeps(alpha):
        return kept(by_hand(original, unlearned, alpha)) >= 0.8 * kept(original)

    share = float(result.alpha_chosen.sel(model="ascent"))

    # The search runs from the end: shares below the best point do not count.
    best = next(k / 64 for k in range(64, -1, -1) if keeps(k / 64))
    assert best - 1 / 64 <= share <= best + 1 / 64


def test_models_given_are_left_as_they_were(original, unlearned, tokenizer):
    before = [copy.deepcopy(m.state_dict()) for m in (original, unlearned)]
    unlearned.train()
    gf.control(original, unlearned, tokenizer, retain=RETAIN, grid=2, tolerance=0.4)
    assert unlearned.training and unlearned.lm_head.training
    unlearned.eval()
    for model, state in zip((original, unlearned), before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    ("tau", "alpha", "n"), [(0.01, 1.0, 5), (1.0, 0.0, 6)], ids=["all kept", "none kept"]
)
def test_no_share_is_measured_twice(original, gentler, tokenizer, monkeypatch, tau, alpha, n):
    """Retention is taken at 0, 1/2 and 1, once by bisection; all metrics at the ends and share."""
    from geffect_fast.measure.evaluator import Evaluator

    called, measure = [], Evaluator.measure

    def counted(self, *args, what, **kwargs):
        called.append(what)
        return measure(self, *args, what=what, **kwargs)

    monkeypatch.setattr(Evaluator, "measure", counted)
    found = gf.control(
        original,
        {"m": gentler},
        tokenizer,
        retain=RETAIN,
        metric="probability",
        grid=2,
        tolerance=0.25,
        tau=tau,
    )
    assert found.alpha_chosen.item() == alpha
    assert len(called) == n and called.count("original") == 2
    assert called.count("unlearned m") == 2
    assert set(called) - {"original", "unlearned m"} <= {
        "share 0.5 of unlearned m",
        "share 0.25 of unlearned m",
    }
    end = found.original_value if alpha == 0 else found.unlearned_value.isel(model=0)
    np.testing.assert_array_equal(found.value.isel(model=0), end)


def test_utility_can_be_what_is_kept(original, unlearned, tokenizer):
    """The number to keep is a utility of the retain data and two probes together."""
    data = {
        "retain": RETAIN[:2],
        "probes": {"real_authors": RETAIN[2:3], "world_facts": RETAIN[3:]},
    }
    found = gf.control(
        original,
        unlearned,
        tokenizer,
        **data,
        metric="model_utility",
        metrics="model_utility",
        max_new_tokens=6,
        grid=2,
        tolerance=0.5,
        tau=0.9,
    )
    for alpha, model in ((0.0, original), (1.0, unlearned)):
        expected = gf.evaluate(
            model,
            tokenizer,
            forget=FORGET,
            **data,
            metrics="model_utility",
            max_new_tokens=6,
        ).value.sel(metric="model_utility", set="all")
        of = found.retention.sel(alpha=alpha, model="unlearned")
        assert float(of) == pytest.approx(float(expected), rel=1e-5)
    assert found.retention.sel(alpha=0.0).item() > 0
    assert json.loads(found.attrs["control"])["set"] == "all"


def test_the_same_call_gives_the_same_bits(original, unlearned, gentler, tokenizer):
    models = {"ascent": unlearned, "gentler": gentler}
    one, two = (
        gf.control(original, models, tokenizer, **(ASKED | {"grid": 2, "tolerance": 1 / 4}))
        for _ in range(2)
    )
    xr.testing.assert_identical(two, one.assign_attrs(created=two.attrs["created"]))


# ---- the command ----


def test_one_unlearned_model_is_in_memory_at_a_time(here, monkeypatch):
    models = watch_models(monkeypatch, kept=1)
    shutil.copytree("ascent", "again")
    command = [*COMMAND, "--unlearned", "ascent", "again", "--forget", "forget.jsonl"]
    assert main([*command, "--grid", "2", "--tolerance", "0.5", "--out", "run", "--quiet"]) == 0
    assert len(models) == 3


@pytest.mark.usefixtures("drawn")
def test_from_folders_to_a_run_that_replays(here, capsys, original, unlearned):
    before = snapshot(here)
    command = [*COMMAND, "--unlearned", "ascent", "adapter", "--forget", "forget.jsonl"]
    assert main([*command, "--out", "run", "--save", "mixed"]) == 0
    printed = capsys.readouterr().out
    for heading in ("share kept", "fails at", "probability, retain", "without mixing"):
        assert heading in printed
    found = gf.open_evaluation("run")
    assert found["model"].values.tolist() == ["ascent", "adapter"]
    after = snapshot(here)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if ".unfinished" in name]
    # The saved model is the one that was measured.
    for name in ("ascent", "adapter"):
        model = load_model(here / "mixed" / name)
        again = gf.evaluate(
            model,
            load_tokenizer_of(here / "mixed" / name),
            forget="forget.jsonl",
            retain="retain.jsonl",
        )
        of = found.value.sel(model=name)
        np.testing.assert_allclose(of, again.value, rtol=1e-5, atol=1e-7)
    share = float(found.alpha_chosen.sel(model="ascent"))
    weight = load_model(here / "mixed/ascent").lm_head.weight
    assert torch.equal(weight, torch.lerp(original.lm_head.weight, unlearned.lm_head.weight, share))
    # A run folder like any other.
    assert main(["control", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))
    assert main(["control", "--config", "run/run.yaml", "--out", "run", "--quiet"]) == 2
    assert "already holds evaluation.nc" in capsys.readouterr().err
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "other", "--quiet"]) == 2
    assert "is of a run of control; use geffect-fast control" in capsys.readouterr().err
    assert main(["show", "run"]) == 0
    assert "share kept of each method" in capsys.readouterr().out
    table = pd.read_csv(here / "run/summary.csv", keep_default_na=False)
    assert ",".join(table.columns) == (
        "model,metric,set,statistic,value,value_low,value_high,original_value,unlearned_value,"
        "alpha_chosen,alpha_lost,retention"
    )
    assert len(table) == 2 * found.value.notnull().sum(["metric", "set"]).max()
    for row in table.to_dict("records"):
        of = found.sel(model=row["model"])
        place = {"metric": row["metric"], "set": row["set"]}
        for name in ("value", "original_value", "unlearned_value"):
            assert row[name] == float(of[name].sel(place))
        share = float(of.alpha_chosen)
        assert row["alpha_chosen"] == share
        assert row["retention"] == float(of.retention.sel(alpha=share))


def load_tokenizer_of(folder):
    from geffect_fast.measure.models import load_tokenizer

    return load_tokenizer(folder)


def test_a_curve_that_rises_is_told(result):
    from geffect_fast.report.summary.measures import rises
    from geffect_fast.report.tables.measures import render_control

    assert bool(result.monotone.all()) and rises(result) == []
    wrong = result.copy(deep=True)
    wrong.retention.loc[{"model": "ascent", "alpha": 0.75}] += 0.5
    wrong["monotone"] = ("model", [False, True])
    (line,) = rises(wrong)
    assert line.startswith("ascent: retention is not monotone along the share (it rises by")
    assert "from 0.625 to 0.75" in line
    assert "not monotone" in text_of(render_control(wrong), 140)

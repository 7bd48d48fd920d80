"""Reports of several runs side by side, and the command that writes them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from html_tree import find, text
from report_views import checked, drawn, rows_of, section, text_of
from step_results import step_dataset

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.report.figures.compare import comparison_figures
from geffect_fast.report.summary.runs import at_equal_removal, comparison_rows
from geffect_fast.report.summary.steps import Agreement
from geffect_fast.report.tables.compare import render_comparison

NAMES = (
    "ga",
    "wga(alpha=1)",
    "npo(beta=0.1)",
    "npo(beta=0.1) + kl",
    "wtnpo(beta=4, alpha=1.5)",
    "gd",
    "po",
    "rmu(layer=3)",
)
STEMS = ["effects", "groups", "risks", "trade_off", "cosines"]


def of(n=2, explodes=False, **kwargs):
    """Results of several runs by name, the first of which may explode."""
    return {
        name: step_dataset((name,), seed=i, explodes=explodes and i == 0, **kwargs)
        for i, name in enumerate(NAMES[:n])
    }


def with_risks(*paths):
    """A comparison of runs with the given forget and retain risks `(steps, 2)`."""
    runs = of(len(paths), n_steps=len(paths[0]), resolve=(), weights=False)
    for result, path in zip(runs.values(), paths, strict=True):
        result["risk_value"][:] = path
    return gf.compare(runs)


def awkward():
    """Comparisons that break naive reports, by name, and the figures they lack."""
    broken = of(3, n_steps=5)
    broken["ga"]["g_effect"][2:] = np.nan
    broken["ga"]["risk_value"][3:] = np.inf
    broken["wga(alpha=1)"]["risk_value"][:] = np.nan
    three = of(2, n_steps=3, risks=("unlearn", "retain", "general"))
    return {
        "broken": (broken, ()),
        "two steps": (of(n_steps=2), ()),
        "eight runs, many steps": (of(8, True, n_steps=400, n_blocks=3, weights=False), ()),
        "only totals": (of(n_steps=3, resolve=()), ("groups",)),
        "three risks": (three, ()),
        "one risk": (of(n_steps=3, risks=("unlearn",)), ("trade_off",)),
        "no norms": ({k: d.drop_vars("cosine") for k, d in of(n_steps=3).items()}, ("cosines",)),
    }


@pytest.mark.slow
def test_any_comparison_has_its_figures_and_table():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for name, (runs, without) in awkward().items():
            figures = comparison_figures(gf.compare(runs))
            assert list(figures) == [stem for stem in STEMS if stem not in without], name
            for stem, figure in figures.items():
                if name in ("broken", "eight runs, many steps") or stem == "trade_off":
                    figure.draw_without_rendering()
                label = figure.get_label()
                assert label.endswith(".") and "\n" not in label and "nan" not in label
            text = text_of(render_comparison(gf.compare(runs)))
            assert max(map(len, text.splitlines())) <= 120, name
            assert all(run.split("(")[0] in text for run in runs)


def test_a_line_is_a_run():
    runs = gf.compare(of(3, n_blocks=6, risks=("unlearn", "retain", "general")))
    figures = comparison_figures(runs)
    for m in range(3):
        lines = drawn(figures["effects"].axes[m])
        assert list(lines) == list(NAMES[:3])
        for k, name in enumerate(NAMES[:3]):
            np.testing.assert_array_equal(lines[name], runs.g_effect[k, :, m])
            panel = figures["groups"].axes[3 * m + 2]
            deep = runs.group_effect.sel(group="deep")[k, :, m]
            np.testing.assert_array_equal(drawn(panel)[name], deep)
    titles = [panel.get_title(loc="left") for panel in figures["groups"].axes]
    assert titles[0] == "e_u, shallow blocks" and titles[5] == "e_r, deep blocks"
    rise = runs.risk_value[0] - runs.risk_value[0, 0]
    for m, panel in enumerate(figures["trade_off"].axes, 1):
        np.testing.assert_array_equal(panel.get_lines()[0].get_xydata(), rise[:, [0, m]])


def test_what_is_not_finite_is_said():
    figures = comparison_figures(gf.compare(awkward()["broken"][0]))
    assert "ga at 3 steps from 2" in figures["effects"].axes[0].get_title(loc="left")
    title = " ".join(figures["trade_off"].axes[0].get_title(loc="left").split())
    assert title.endswith("ga at 2 steps; wga(alpha=1) at 5 steps")


def test_harm_is_compared_at_equal_removal():
    first = [(1, 1), (2, 1.5), (4, 4), (9, 9)]
    second = [(1, 2), (1.5, 2), (2.5, 2.1), (3, 2.2)]
    runs = with_risks(first, second)
    target, harms = at_equal_removal(runs)
    assert target == 2  # the rise that the second run reaches
    assert harms == pytest.approx([0.5 + 0.5 * 2.5, 0.2])  # half way from step 1 to step 2
    rows = comparison_rows(runs)
    assert [row["cost"] for row in rows] == pytest.approx([1, 0.1])
    assert [row["rise_unlearn"] for row in rows] == [8, 2]
    text = text_of(render_comparison(runs))
    assert "harm at +2" in text and "+1.8" in text and "mostly harm" in text
    never = with_risks(first, [(2, 2), (1, 3), (1, 3), (1, 3)])
    assert all(
        math.isnan(value) for value in (at_equal_removal(never)[0], *at_equal_removal(never)[1])
    )
    lost = with_risks(first, [(1, 1), (np.inf, np.inf), (np.nan, 1), (np.nan, 1)])
    assert math.isnan(at_equal_removal(lost)[0])


def test_a_row_sums_up_a_run():
    given = of(2, noise=0.4)
    runs = gf.compare(given)
    for row, result in zip(comparison_rows(runs), given.values(), strict=True):
        retain = result.sel(risk="retain")
        total = float(retain.g_effect.sum())
        assert row["sum_of_effects_retain"] == pytest.approx(total)
        found = Agreement.of(
            retain.measured_change.values, retain.predicted_update.values, result.step.values
        )
        assert row["correlation_retain"] == found.correlation


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two runs as the working folder."""
    for name, result in zip("ab", of(2, n_steps=3, weights=False).values(), strict=True):
        (tmp_path / name).mkdir()
        result.to_netcdf(tmp_path / name / "results.nc", engine="h5netcdf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_writes_tables_and_plots(here, capsys):
    assert main(["compare", "a", "b/results.nc"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 runs at the 3 steps they share, 0 to 2")
    assert printed.split()[-6:] == ["compare", *(f"compare/plots/{s}.png" for s in sorted(STEMS))]
    names = {path.name for path in (here / "compare/plots").iterdir()}
    assert names == {f"{stem}.{end}" for stem in STEMS for end in ("png", "svg")}
    table = pd.read_csv(here / "compare/summary.csv")
    assert list(table["run"]) == ["a", "b"] and list(table["objective"]) == list(NAMES[:2])
    runs = gf.compare(["a", "b"])
    steps = pd.read_csv(here / "compare/compare.csv").set_index(["run", "step"])
    np.testing.assert_allclose(steps.g_effect_retain.loc["a"], runs.g_effect[0, :, 1])
    deep = runs.group_effect.sel(group="deep", risk="unlearn")[1]
    np.testing.assert_allclose(steps.group_effect_unlearn_deep.loc["b"], deep)
    assert not list(here.rglob(".*"))


def test_a_run_has_one_name_wherever_it_stands(here, capsys, monkeypatch):
    """The folder's name is used in a comparison, on pages of several runs and on the run's page."""
    for name in ("compare.comparison", "result.result"):  # pages have figures of their own
        monkeypatch.setattr(f"geffect_fast.report.figures.{name}_drawings", lambda *_: {})
    assert main(["compare", "a", "b", "--out", "both"]) == 0
    assert list(pd.read_csv("both/summary.csv")["run"]) == ["a", "b"]
    assert main(["report", "a", "b", "--out", "both.html"]) == 0
    page = checked(Path("both.html").read_text(encoding="utf-8"))
    assert [row[0] for row in rows_of(section(page, "verdicts"), "What was")[1:]] == ["a", "b"]
    assert main(["report", "a"]) == 0
    own = checked(Path("a/report.html").read_text(encoding="utf-8"))
    assert text(find(own, "h1")[0]).endswith(": a")


def test_the_command_replaces_a_comparison_where_told_to(here, capsys, monkeypatch):
    monkeypatch.setattr("geffect_fast.report.figures.compare.comparison_drawings", lambda _: {})
    (here / "c").mkdir()
    for name in ("summary.csv", "compare.csv"):  # an earlier version made no list
        (here / f"c/{name}").write_text("an earlier one")
    assert main(["compare", "a", "b", "--out", "c", "--quiet"]) == 2
    assert "already holds summary.csv" in capsys.readouterr().err
    assert main(["compare", "a", "b", "--out", "c", "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr() == ("", "")
    assert len(pd.read_csv(here / "c/summary.csv")) == 2

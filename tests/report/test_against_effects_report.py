"""Reports of measures beside effects: tables of the page and of the terminal, and the figure."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from html_tree import find, text
from measured import METRICS, STUDY, against
from report_views import checked, rows_of, section, text_of, words_of

from geffect_fast.cli import main
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.report.figures.measures import measure_figures
from geffect_fast.report.format import number
from geffect_fast.report.html.page import page_html
from geffect_fast.report.summary.predictors import correlation_rows, prediction_sentence
from geffect_fast.report.tables.against_effects import render_beside
from geffect_fast.report.tables.measures import render_measures
from geffect_fast.storage.run_folder import EVALUATION
from geffect_fast.storage.save_run import save_run

RUN = "npo"


@pytest.fixture(scope="module")
def dataset():
    return against()


@pytest.fixture(scope="module")
def page(dataset):
    return checked(page_html({"run": dataset}))


def number_and_bounds(of, name, spec):
    """A number of a result with its bounds, as a cell of the page."""
    value, low, high = (number(float(of[f"{name}{end}"]), spec) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]" if np.isfinite(float(of[f"{name}_low"])) else value


def test_a_page_has_what_was_known_of_every_run(dataset, page):
    head, *rows = rows_of(page, "What is known at the original model")
    predictors = dataset["predictor"].values.tolist()
    assert head == ["run", "objective", *predictors] and len(predictors) >= 5
    assert [row[:2] for row in rows] == [[*each] for each in STUDY.items()]
    of = dataset.sel(run=RUN)
    assert rows[1][2:] == [
        number_and_bounds(of.sel(predictor=p), "effect", "+.2g") for p in predictors
    ]
    assert "[" in rows[1][2]


@pytest.mark.parametrize(("where", "n"), [("forget", 3), ("retain", 2)])
def test_changes_on_every_set_stand_beside_effects(dataset, page, where, n):
    head, *rows = rows_of(page, f"Effects before, and changes on {where}")
    metrics = [*METRICS][:n]  # membership has no set but forget
    assert head == ["run", "e_u", "e_r", "collateral", *metrics]
    of = dataset.sel(run=RUN)
    assert rows[1] == [
        RUN,
        *(number(float(of.effect.sel(predictor=p)), "+.2g") for p in head[1:4]),
        *(number(float(of.change.sel(metric=m, set=where)), "+.3g") for m in metrics),
    ]


def test_a_page_begins_with_how_far_effects_tell_changes(dataset, page):
    (title,) = find(page, "h1")
    assert text(title) == "Measures beside effects: run"
    assert text(section(page, "answer")).count(prediction_sentence(dataset)) == 1
    assert prediction_sentence(dataset) not in text(section(page, "effects"))
    head, *rows = rows_of(page, "Rank correlations")
    cells = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    table = correlation_rows(dataset)
    assert len(table) == sum(map(len, cells.values()))
    for at in table[["predictor", "metric", "set"]].to_dict("records"):
        of = dataset.sel(at)
        star = "*" if bool(of["beyond_noise"]) else ""
        found = cells[f"{at['metric']}, {at['set']}"][at["predictor"]]
        assert found == number_and_bounds(of, "spearman", "+.2f") + star


ONE = {"probability": "mean"}


def test_of_few_runs_there_are_no_correlations_and_a_page_says_why():
    root = checked(page_html({"run": against(3, metrics=ONE)}))
    assert "Rank correlations need 5 runs or more; these are 3." in text(section(root, "answer"))
    effects = section(root, "effects")
    assert "Spearman's rank correlation" not in text(effects)
    labels = [table[1]["aria-label"] for table in find(effects, "table")]
    assert not [label for label in labels if label.startswith("Rank")] and len(labels) == 3
    assert find(effects, "figure"), "what was measured is drawn all the same"


def test_points_are_the_effects_and_changes_of_runs(dataset):
    figure = measure_figures(dataset)["against_effects"]
    shown = ("e_u", "e_r", "collateral", "update_u", "update_r")
    assert len(figure.axes) == len(METRICS) * len(shown)
    for i, metric in enumerate(METRICS):
        for panel, predictor in zip(figure.axes[5 * i : 5 * i + 5], shown, strict=True):
            points = {each.get_label(): each.get_offsets() for each in panel.collections}
            assert [*points] == (["forget"] if metric.startswith("min_k") else ["forget", "retain"])
            for name, found in points.items():
                of = dataset.sel(metric=metric, set=name, predictor=predictor)
                there = np.isfinite(of.effect.values)
                wanted = np.stack([of.effect, of.change], axis=1)[there]
                np.testing.assert_array_equal(found, wanted)
            low, high = panel.get_xlim()
            known = dataset.effect.sel(predictor=predictor).values
            assert low < np.nanmin(known) and np.nanmax(known) < high, "no point is cut"


def test_what_is_the_same_in_all_runs_is_not_drawn():
    dataset = against()
    dataset["change"].loc[{"metric": "truth_ratio"}] = 0.25
    titles = [
        panel.get_title(loc="left") for panel in measure_figures(dataset)["against_effects"].axes
    ]
    assert len(titles) == 10 and not [t for t in titles if t.startswith("truth_ratio")]
    dataset["change"][:] = 0.25
    assert "against_effects" not in measure_figures(dataset)
    checked(page_html({"run": dataset}))


# ---- the terminal ----


def test_a_table_of_many_metrics_is_cut_and_each_part_names_runs_and_effects():
    """Every number of the result is in one of the parts, in 120 columns and without an ellipsis."""
    many = {f"metric_{i}": "mean" for i in range(5)}
    dataset = against(metrics=many)
    tables = render_beside(dataset)
    assert len(tables) == 3, "ten numbers, four a table"
    parts = [text_of(table, 120) for table in tables]
    for part in parts:
        assert all(run in part for run in ("original", *STUDY)) and "…" not in part
        assert all(name in part for name in ("e_u", "e_r", "collateral"))
        assert max(map(len, part.splitlines())) <= 120
    heads = ["/".join(head.split()) for table in tables for head in table.heads[4:]]
    assert heads == [f"{metric}/{name}" for metric in many for name in ("forget", "retain")]
    for at, metric in enumerate(many):
        value = float(dataset.value.sel(model=RUN, metric=metric, set="retain"))
        change = float(dataset.change.sel(run=RUN, metric=metric, set="retain"))
        part = " ".join(parts[(2 * at + 1) // 4].split())
        assert f"{value:.3g}" in part and f"{change:+.2g}" in part


def test_the_terminal_prints_both_tables(dataset):
    printed = words_of(render_measures(dataset), 160)
    for words in (
        "effects at the original model beside what unlearning did",
        f"rank correlations over {len(STUDY)} runs",
        "τ: Kendall's.",
        prediction_sentence(dataset),
    ):
        assert words in printed


# ---- a folder ----


def test_what_is_missing_in_a_folder_is_written_by_report(tmp_path, capsys):
    dataset = against(metrics=ONE)
    config = EvaluateConfig(models=["a"], forget="f.jsonl", retain="r.jsonl")
    whole = dataset.assign_attrs(n_rows=json.dumps({}))
    save_run(tmp_path / "run", whole, config, file=EVALUATION)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "rank correlations over" in capsys.readouterr().out
    assert (tmp_path / "run/plots/against_effects.png").is_file()
    with (tmp_path / "run/runs.csv").open(encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["objective"] for name, row in rows.items()} == STUDY
    wanted = float(dataset.change.sel(run=RUN, metric="probability", set="retain"))
    assert float(rows[RUN]["change of probability retain"]) == pytest.approx(wanted, rel=1e-12)
    assert (tmp_path / "run/against_effects.csv").is_file()
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "all.csv")]) == 0
    with (tmp_path / "all.csv").open(encoding="utf-8") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"original", *STUDY}

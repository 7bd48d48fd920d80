"""Reports on measures: pages, figures and tables of evaluate, control and relearn."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from html_tree import find, text
from measured import KINDS, METRICS, measured, measures
from report_views import checked, rows_of, section, sections, words_of

from geffect_fast.errors import InputError, UnfinishedError
from geffect_fast.report import write_report
from geffect_fast.report.figures.measures import measure_figures
from geffect_fast.report.html.page import page_html, write_page
from geffect_fast.report.summary.measures import measure_findings, number_with_bounds
from geffect_fast.report.summary.survey import survey_rows
from geffect_fast.report.tables.measures import render_measures

SECTIONS = ["answer", "signs", "curves", "measures", "instances", "made"]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder of a report on measures of a kind, made once."""

    @functools.cache
    def folder_of(kind):
        folder = tmp_path_factory.mktemp("reported") / kind
        folder.mkdir()
        (folder / "run.yaml").write_text("models: [a]\nseed: 3\n")
        write_report(measured(kind), folder)
        return folder

    return folder_of


@pytest.fixture(scope="module")
def page_of(reported):
    """The page of a report's folder."""
    return functools.cache(
        lambda kind: checked((reported(kind) / "report.html").read_text(encoding="utf-8"))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_whole_and_has_every_number(kind, page_of):
    dataset, root = measured(kind), page_of(kind)
    own = {"control": ["shares"], "survey": ["survey"], "against": ["effects"]}.get(kind, [])
    assert sections(root) == [*SECTIONS[:2], *own, *SECTIONS[2:]]
    table = text(section(root, "measures"))
    value = dataset["value"]
    axes = [dim for dim in value.dims if dim not in ("metric", "set")]
    for at in np.ndindex(*value.shape):
        of = dataset.isel(dict(zip(value.dims, at, strict=True)))
        assert number_with_bounds(of) in table, (axes, at)
    assert "What truth_ratio is." in text(section(root, "signs"))
    assert "seed" in text(section(root, "made"))


def test_a_table_of_several_models_names_them_in_its_rows(page_of):
    dataset, root = measured("several"), page_of("several")
    head, *rows = rows_of(root, "truth_ratio (mean)")
    assert head == ["model", "forget", "retain"]
    assert [row[0] for row in rows] == dataset["model"].values.tolist()
    of = dataset.sel(model="npo", metric="truth_ratio", set="retain")
    value, low, high = (float(of[n]) for n in ("value", "value_low", "value_high"))
    assert rows[1][2] == f"{value:.3g} [{low:.2g}, {high:.2g}]"
    # a measure without a number of a set has no column for the set
    assert rows_of(root, "min_k(k=0.2) (AUC)")[0] == ["model", "forget"]


def test_a_page_of_a_control_has_shares_and_the_models_as_they_are(page_of):
    dataset, root = measured("control"), page_of("control")
    _, ga, npo = rows_of(root, "Share kept")
    assert ga[:3] == ["ga", "0.25", "0.5"] and npo[:3] == ["npo", "0.25", "0.312"]
    assert npo[3:] == ["0.7 [0.65, 0.75]", "87.5%", "12.5%"]
    rows = {row[0]: row[1:] for row in rows_of(root, "probability (mean)")[1:]}
    assert list(rows) == [
        *("original", "ga, without mixing", "npo, without mixing"),
        *("ga, 0.25 of it", "npo, 0.25 of it"),
    ]
    whole = float(dataset["unlearned_value"].sel(model="npo", metric="probability", set="forget"))
    assert rows["npo, without mixing"][0] == f"{whole:.3g}"
    assert "retention is not monotone" in text(section(root, "answer"))


def test_a_page_of_a_relearning_has_a_column_a_model(page_of):
    dataset = measured("relearn")
    rows = rows_of(page_of("relearn"), "truth_ratio: others")
    assert rows[0] == ["update", "unlearned", "original"]
    assert [row[0] for row in rows[1:]] == ["0", "2", "4"]
    last = dataset.sel(model="original", metric="truth_ratio", set="others", step=4)
    assert rows[3][2] == number_with_bounds(last)
    assert (
        "4 updates on 6 of 12 forget rows"
        in measure_findings(dataset.assign_attrs(n_rows=json.dumps({"relearned": 6, "others": 6})))[
            0
        ]
    )


def test_the_terminal_lists_no_rows_without_a_number():
    dataset = measured("several").copy(deep=True)
    assert "min_k(k=0.2)" in words_of(render_measures(dataset))
    dataset["value"].loc[{"metric": "min_k(k=0.2)"}] = np.nan
    assert "min_k(k=0.2)" not in words_of(render_measures(dataset))
    dataset = measured("relearn").copy(deep=True)
    dataset["value"].loc[{"metric": "probability", "set": "others", "model": "original"}] = np.nan
    printed = words_of(render_measures(dataset))
    assert "probability others unlearned" in printed and "truth_ratio others original" in printed
    assert "probability others original" not in printed


def test_the_assessment_is_one_table_of_named_rows(page_of):
    dataset, root = measured("survey"), page_of("survey")
    head, *rows = rows_of(root, "Every aspect")
    assert head == ["measure", "ga", "npo", "$\\frac{$"]
    cells = {row[0]: row[1:] for row in rows}
    assert [row[0] for row in rows if not any(row[1:])] == [
        *("Efficacy", "Utility", "Robustness", "Efficiency", "Effects")
    ]
    of = dataset.sel(model="npo", metric="truth_ratio", set="retain")
    assert cells["truth_ratio, retain"][1] == number_with_bounds(of)
    last = dataset.sel(relearned_metric="probability", relearned_set="others", model="npo")
    first, last = (last.isel(relearned_step=at) for at in (0, 1))
    value, low, high = (float(last[f"relearned{end}"]) for end in ("", "_low", "_high"))
    assert cells["relearning: probability, others"][1] == (
        f"{float(first['relearned']):.3g} to {value:.3g} [{low:.2g}, {high:.2g}]"
    )
    assert cells["time of the updates, s"] == ["", "12.5", "0.25"]
    assert cells["peak memory, MiB"] == ["", "3", "1,024"]
    assert cells["parameters touched"] == ["0.000%", "50.000%", ""]
    # each model's own objective; the original has none
    assert cells["trained on"] == ["", "npo", ""]
    assert cells["e_u"] == ["", "-1.5 [-1.6, -1.4]", ""]
    assert cells["e_r of gd"] == ["-0.25 [-0.35, -0.15]", "", ""]
    words = text(section(root, "survey"))
    assert "Of ga nobody knows the cost." in words and "4 updates on 2 rows" in words
    printed = words_of(render_measures(dataset), 300)
    for row in survey_rows(dataset):
        assert row.name in printed and all(cell in printed for cell in row.cells)


def test_effects_of_an_original_that_was_not_evaluated_have_a_column():
    dataset = measured("survey").assign_attrs(original_place="")
    head, *rows = rows_of(checked(page_html({"run": dataset})), "Every aspect")
    assert head[-1] == "original"
    cells = {row[0]: row[1:] for row in rows}
    assert cells["e_u of gd"] == ["", "", "", "-2.5 [-2.6, -2.4]"]
    assert cells["e_u"][-1] == ""


def test_nothing_is_said_of_effects_that_are_not_known():
    dataset = measured("survey").drop_vars(["effect", "effect_low", "effect_high"])
    assert [row.aspect for row in survey_rows(dataset)][-1] == "efficiency"


def test_rows_are_those_to_be_forgotten_the_highest_first(page_of):
    dataset = measured("several")
    of = dataset["sample_value"].sel(metric="probability")
    of = of.isel(sample=(dataset["sample_set"] == "forget").values)
    order = np.argsort(-of.max("model").values)
    _, *rows = rows_of(page_of("several"), "By probability")
    assert [row[0] for row in rows] == [f"{i}: who wrote book {i}?" for i in order]
    assert rows[0][1:] == [f"{float(v):.3g}" for v in of.values[:, order[0]]]


def test_text_from_data_stays_text():
    nasty = ["<script>alert(1)</script>", "\"q\" & 'm' </td>", "x" * 3000, "🦜", "a\x07b", ""]
    html = page_html({"<b>run</b>": measured("one", questions=nasty)})
    root = checked(html)
    assert not find(root, "script") and not find(root, "b")
    listed = text(section(root, "instances"))
    assert nasty[0] in listed and nasty[1] in listed and len(listed) < 1500


def test_measures_without_a_number_say_so():
    dataset = measures()
    for name in ("value", "value_low", "value_high", "sample_value"):
        dataset[name][:] = np.nan
    root = checked(page_html({"run": dataset}))
    assert "No metric gave a number" in text(section(root, "answer"))
    assert words_of(render_measures(dataset)) == "No metric gave a number on any set."
    assert "curves" not in sections(root)


def test_a_result_of_an_earlier_version_says_nothing_of_its_metrics():
    dataset = measures().assign_attrs(metrics=json.dumps([{"name": n} for n in METRICS]))
    assert "signs" not in sections(checked(page_html({"run": dataset})))


def test_one_page_is_of_one_run_of_measures(tmp_path):
    with pytest.raises(InputError, match=r"evaluate several models in one run \(--models A B\)"):
        write_page({"a": measured("one"), "b": measured("one")}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# ---- figures ----


def test_marks_and_bars_are_the_numbers_and_their_bounds():
    dataset = measured("several")
    panels = measure_figures(dataset)["measures"].axes
    assert [panel.get_title(loc="left") for panel in panels] == list(METRICS)
    (probability, _, membership) = panels
    for panel, metric, sets in ((probability, "probability", 2), (membership, "min_k(k=0.2)", 1)):
        of = dataset.sel(metric=metric).isel(set=slice(sets))
        for line, model in zip(panel.get_lines(), dataset["model"].values, strict=True):
            assert line.get_label() == model
            np.testing.assert_array_equal(line.get_xdata(), of.sel(model=model)["value"])
    bars = [c.get_segments() for c in probability.collections]
    low_high = np.array([[s[:, 0] for s in bar] for bar in bars])
    of = dataset.sel(metric="probability")
    np.testing.assert_allclose(low_high[..., 0], of["value_low"])
    np.testing.assert_allclose(low_high[..., 1], of["value_high"])


def test_lines_over_steps_are_the_numbers():
    dataset = measured("relearn")
    figure = measure_figures(dataset)["measures"]
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles[:2] == ["probability: relearned", "probability: others"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].get_lines()}
    of = dataset.sel(metric="probability", set="others")
    for model in ("unlearned", "original"):
        np.testing.assert_array_equal(lines[model], of["value"].sel(model=model))
    assert [each.get_text() for each in figure.legends[0].get_texts()] == ["unlearned", "original"]


def test_retention_is_drawn_where_it_was_measured():
    dataset = measured("control")
    (panel,) = measure_figures(dataset)["retention"].axes
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert lines["ga"].get_xdata().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert lines["npo"].get_ydata().tolist() == [0.8, 0.7, 0.69, 0.5, 0.4, 0.1]
    assert lines["70% of the original's"].get_ydata()[0] == pytest.approx(0.56)


# ---- files ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_a_report(kind, reported):
    folder = reported(kind)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    own = {"control": "retention", "survey": "relearned", "against": "against_effects"}
    drawn = ["measures", *([own[kind]] if kind in own else [])]
    assert names == {
        *("run.yaml", "report.html", "summary.csv"),
        *(("runs.csv", "against_effects.csv") if kind == "against" else ()),
        *(f"plots/{name}.{ending}" for name in drawn for ending in ("png", "svg")),
    }


def test_what_cannot_be_drawn_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "geffect_fast.report.figures.measures.measures_figure", lambda _: 1 / 0, raising=True
    )
    with pytest.raises(UnfinishedError, match="division by zero"):
        write_report(measured("one"), tmp_path)
    assert (tmp_path / "summary.csv").exists()

"""Reports of a step result: figures, table, CSV and sentences, for awkward results too."""

from __future__ import annotations

import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from report_views import ORDER, checked, drawn, sections, text_of
from step_results import step_dataset, trained_result
from synthetic import OBJECTIVES

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.report import write_report
from geffect_fast.report.figures.layer_maps import edges_of
from geffect_fast.report.figures.steps import SHOWN, step_figures
from geffect_fast.report.figures.style import fit_scale, save_figure, style_of
from geffect_fast.report.html.page import page_html
from geffect_fast.report.html.steps import measured, verdicts
from geffect_fast.report.summary.effects import by_place, total
from geffect_fast.report.summary.step_findings import outcome_sentence, trust_sentences
from geffect_fast.report.summary.steps import Agreement, Outcome, Steps, agreements
from geffect_fast.report.tables.steps import ROWS, render_steps

STEMS = ["effects", "risks", "groups", "layers", "prediction", "cosines", "norms", "token_weights"]

DRAWN = {"broken": STEMS, "large": STEMS[:2], "all nan": STEMS[:1], "explodes": STEMS[3:5]}
"""Figures of awkward results that are drawn; the others are only made, as drawing takes long."""
ON_A_PAGE = ("broken", "all nan", "one step", "only totals", "tokens")
"""Awkward results whose page is written."""


def awkward():
    """Step results that break naive reports, by name, and the figures they lack."""
    broken = step_dataset(OBJECTIVES[:2], n_steps=8)
    broken["g_effect"][3:, 0] = np.nan
    broken["g_effect"][5, 1, 0] = np.inf
    broken["risk_value"][4:, 1] = np.inf
    broken["measured_change"][4:] = np.nan
    broken["grad_norm"][2] = np.inf
    broken["cosine"][2] = np.nan
    broken["token_weight"][4:, 0] += np.inf
    all_nan = step_dataset(n_steps=4)
    for name in all_nan.data_vars:
        all_nan[name][:] = np.nan
    zero = step_dataset(n_steps=4) * 0.0
    zero.attrs = broken.attrs
    large = step_dataset(n_steps=5)
    large["g_effect"] = large["g_effect"] * 1e300
    large["risk_value"] = large["risk_value"] * 1e305
    small = step_dataset(n_steps=5)
    small["g_effect"] = small["g_effect"] * 1e-300
    no_norms = step_dataset().drop_vars(["cosine", "grad_norm", "risk_grad_norm"])
    by_token = {"n_forget": 2, "resolve": ("sample", "token"), "weights": False}
    tokens = step_dataset(n_steps=2, explodes=True, **by_token)
    many = tuple(f"wga(alpha={i})" for i in range(12))
    four = ("unlearn", "retain", "general", "code")
    return {
        "broken": (broken, ()),
        "all nan": (all_nan, ("prediction", "token_weights")),
        "zero": (zero, ()),
        "large": (large, ()),
        "small": (small, ()),
        "no norms": (no_norms, ("cosines", "norms")),
        "one step": (step_dataset(n_steps=1), ("prediction",)),
        "two steps": (step_dataset(n_steps=2), ()),
        "explodes": (step_dataset(n_steps=40, explodes=True, n_blocks=8), ()),
        "only totals": (step_dataset(resolve=()), ("groups", "layers", "token_weights")),
        "groups": (step_dataset(resolve=("group", "sample")), ()),
        "tokens": (tokens, ("groups", "layers", "token_weights")),
        "four risks": (step_dataset(risks=four, weights=False), ("token_weights",)),
        "many objectives": (step_dataset(many, n_steps=4, trained=False, every=7), ()),
    }


@pytest.fixture
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("strict")
def test_any_step_result_has_its_figures_table_and_sentences():
    for name, (dataset, without) in awkward().items():
        before = dataset.copy(deep=True)
        figures = step_figures(dataset)
        assert list(figures) == [stem for stem in STEMS if stem not in without], name
        for stem, figure in figures.items():
            if stem in DRAWN.get(name, ()):
                figure.draw_without_rendering()
            label = figure.get_label()
            assert label.endswith(".") and "\n" not in label and "nan" not in label, (name, label)
        lines = text_of(render_steps(dataset)).splitlines()
        assert max(map(len, lines)) <= 120, name
        sentences = (outcome_sentence(dataset), *trust_sentences(dataset))
        assert all(s.endswith(".") and "nan" not in s for s in sentences), name
        if name in ON_A_PAGE:
            found = sections(checked(page_html({"run": dataset})))
            assert found == [s for s in ORDER if s in found], name
            assert {"answer", "verdicts", "curves", "table", "signs", "made"} <= set(found), name
            assert ("prediction" in found) == ("prediction" not in without), name
            assert ("tokens" in found) == (name == "tokens" or "token_weights" not in without), name
        assert dataset.identical(before), name


def test_what_is_not_finite_is_said_where_it_is_drawn():
    figures = step_figures(awkward()["broken"][0])
    titles = [" ".join(p.get_title(loc="left").split()) for p in figures["effects"].axes]
    assert "NaN or infinite (×): ga at 5 steps from 3; wga(alpha=1) at step 5" in titles[0]
    assert titles[1].endswith("ga at 5 steps from 3")
    marks = [line for line in figures["effects"].axes[0].get_lines() if line.get_marker() == "x"]
    assert [list(mark.get_xdata()) for mark in marks] == [[3, 4, 5, 6, 7], [5]]
    assert "retain risk at 4 steps from 4" in figures["risks"].axes[0].get_title(loc="left")
    assert "NaN or infinite: 35 cells, grey" in figures["layers"].axes[0].get_title(loc="left")
    assert "at 4 of 8 steps" in figures["token_weights"].axes[0].get_title(loc="left")
    whole = step_figures(step_dataset())
    assert all("NaN" not in p.get_title(loc="left") for f in whole.values() for p in f.axes)


def test_lines_go_through_the_numbers():
    dataset = step_dataset(OBJECTIVES[1:3], risks=("unlearn", "retain", "general"))
    dataset.attrs["trained_objective"] = OBJECTIVES[2]
    figures, totals = step_figures(dataset), total(dataset)
    for m, panel in enumerate(figures["effects"].axes):
        lines = drawn(panel)
        assert list(lines) == [OBJECTIVES[2], OBJECTIVES[1]]  # the trained objective first
        for k, name in enumerate(OBJECTIVES[1:3]):
            np.testing.assert_array_equal(lines[name], totals[:, k, m])
        cosines = drawn(figures["cosines"].axes[m])
        np.testing.assert_array_equal(cosines[OBJECTIVES[1]], dataset["cosine"][:, 0, m])
    risks = drawn(figures["risks"].axes[0])
    np.testing.assert_array_equal(risks["general risk"], dataset["risk_value"][:, 2])
    labels, groups = by_place(dataset, blocks=False)
    assert labels[:2] == ["embedding", "shallow"] and groups.shape == (13, 2, 3, 6)
    for m, panel in enumerate(figures["groups"].axes):
        np.testing.assert_array_equal(drawn(panel)["lm head"], groups[:, 1, m, -1])
        np.testing.assert_allclose(sum(drawn(panel).values()), totals[:, 1, m])
    norms = drawn(figures["norms"].axes[0])
    np.testing.assert_array_equal(norms[OBJECTIVES[1]], dataset["grad_norm"][:, 0])
    maps = [panel for panel in figures["layers"].axes if panel.collections]
    blocks = by_place(dataset, blocks=True)[1]
    np.testing.assert_array_equal(maps[1].collections[0].get_array(), blocks[:, 1, 1].T)
    np.testing.assert_array_equal(maps[3].collections[0].get_array(), blocks[:, 0, 0].T)


def test_predictions_are_drawn_against_what_was_measured():
    dataset = step_dataset(noise=0.3)
    figure = step_figures(dataset)["prediction"]
    upper, lower = figure.axes[:2], figure.axes[2:4]
    for m in range(2):
        lines = drawn(upper[m])
        np.testing.assert_array_equal(lines["measured"], dataset["measured_change"][:, m])
        np.testing.assert_array_equal(
            lines["predicted by SGD, −lr·e"], dataset["predicted_sgd"][:, m]
        )
        points = lower[m].collections[0].get_offsets().filled(np.nan)
        np.testing.assert_array_equal(points[1:, 0], dataset["predicted_update"][1:, m])
        np.testing.assert_array_equal(points[1:, 1], dataset["measured_change"][1:, m])
        r = np.corrcoef(dataset["predicted_update"][1:, m], dataset["measured_change"][1:, m])[0, 1]
        assert f"r = {r:.3f}" in lower[m].get_legend().get_texts()[0].get_text()


def test_bands_are_quantiles_of_the_tokens_that_are_there():
    dataset = step_dataset(OBJECTIVES[:2])
    figure = step_figures(dataset)["token_weights"]
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert titles == ["ga: forget rows", "ga: retain rows"]  # the other reads no retain rows
    forget = dataset["token_weight"].values[:, 0, dataset["set"].values == "forget"]
    flat = forget.reshape(len(forget), -1)
    flat = flat[:, ~np.isnan(flat[0])]
    np.testing.assert_allclose(drawn(figure.axes[0])["median"], np.median(flat, axis=1))
    band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    low, high = np.quantile(flat, [0.05, 0.95], axis=1)
    np.testing.assert_allclose([band.min(), band.max()], [low.min(), high.max()])


def test_scales_follow_decades():
    def scale(*lines, **more):
        chosen = []
        words = fit_scale(lambda *a, **k: chosen.append((a[0], k)), list(lines), **more)
        return words, chosen

    assert scale(np.array([-1.0, 2.0, 30.0])) == ("", [])
    assert scale(np.array([np.nan, 0.0])) == scale() == ("", [])
    exploding = -np.logspace(0, 4, 20)
    words, ((kind, more),) = scale(exploding)
    assert (kind, more["linthresh"]) == ("symlog", 1.0) and "within ±1)" in words
    assert scale(np.array([1.0, 1e4]), positive=True) == ("(log scale)", [("log", {})])
    words, ((_, more),) = scale(np.array([1e-9] * 9 + [1e9]))
    assert more["linthresh"] == 1e3  # six decades can still be read
    effects = step_figures(step_dataset(n_steps=50, explodes=True))["effects"].axes[0]
    assert effects.get_yscale() == "symlog" and effects.get_ylim()[1] < 1  # no space is left empty


def test_many_lines_differ():
    assert len({tuple(style_of(i).items()) for i in range(32)}) == 32
    colours = {style_of(i)["color"] for i in range(8)}
    assert len(colours) == 8
    panel = step_figures(awkward()["many objectives"][0])["effects"].axes[0]
    assert len(drawn(panel)) == SHOWN and "wga(alpha=0)" in drawn(panel)
    assert panel.figure.get_suptitle() == "objectives left out: 4"


def test_uneven_steps_have_their_own_widths():
    np.testing.assert_array_equal(edges_of(np.array([0, 1, 5])), [-0.5, 0.5, 3, 7])
    np.testing.assert_array_equal(edges_of(np.array([3])), [2.5, 3.5])


def test_a_figure_as_svg_keeps_its_text_and_is_the_same_again(tmp_path):
    written = []
    for _ in range(2):
        figure = step_figures(step_dataset(n_steps=3))["risks"]
        save_figure(figure, tmp_path / "risks", ("svg",))
        written.append((tmp_path / "risks.svg").read_text(encoding="utf-8"))
    assert written[0] == written[1]
    root = ElementTree.fromstring(written[0])
    texts = {t.text for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"update step", "forget risk", "Risks while trained on ga"} <= texts
    assert figure.get_label() in written[0]


def test_pictures_leave_no_global_state_behind(tmp_path):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    save_figure(step_figures(step_dataset(n_steps=3))["risks"], tmp_path / "risks")
    assert {file.name for file in tmp_path.iterdir()} == {"risks.png", "risks.svg"}
    assert (tmp_path / "risks.png").read_bytes().startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == before and not plt.get_fignums()


# ---- numbers ----


def test_an_agreement_is_the_correlation_of_finite_pairs():
    rng = np.random.default_rng(0)
    y = rng.normal(size=40)
    x = y + 0.2 * rng.normal(size=40)
    x[0], y[3], steps = np.nan, np.inf, np.arange(40) * 10
    good = np.isfinite(x) & np.isfinite(y)
    found = Agreement.of(y, x, steps)
    assert found.n == 38
    assert found.correlation == pytest.approx(np.corrcoef(x[good], y[good])[0, 1])
    assert found.same_sign == pytest.approx((np.sign(x) == np.sign(y))[good].mean())
    assert found.error == pytest.approx(np.median(np.abs(1 - x[good] / y[good])))
    for scale in (1e-300, 1e290):
        scaled = Agreement.of(scale * y, scale * x, steps)
        assert scaled.correlation == pytest.approx(found.correlation)


def test_when_to_trust_first_order():
    steps, rng = np.arange(50), np.random.default_rng(1)
    y = 1.0 + rng.random(50)
    words = "trust it in sign and size: within a factor of 1.5"
    assert Agreement.of(y, 1.02 * y, steps).words == words
    assert Agreement.of(y, 1.6 * y, steps).words == "trust its sign, not its size"
    assert not Agreement.of(y, -1.02 * y, steps).words.startswith("trust")
    assert Agreement.of(y, 9 * y, steps).words == "trust its sign, not its size"
    assert Agreement.of(y, rng.normal(size=50), steps).words.startswith("do not trust it")
    assert Agreement.of(y[:2], y[:2], steps[:2]).words.startswith("too few")
    assert Agreement.of(np.ones(9), np.ones(9), steps[:9]).words.startswith("too few or too equal")
    assert Agreement.of(np.full(3, np.nan), y[:3], steps[:3]).n == 0
    later = np.where(steps < 20, y, 8 * y)
    found = Agreement.of(y, later, steps)
    assert found.until == 21 and found.words.endswith("within 50 % up to step 21")


@pytest.mark.parametrize("late", [1, 3, 6])
def test_a_curve_a_hundred_times_off_is_not_trusted_in_size(late):
    """Its median error is 2 % and its correlation 0.99: a few changes make up most of the curve."""
    steps, rng = np.arange(50), np.random.default_rng(1)
    y = 1.0 + rng.random(50)
    y[-late:] = np.linspace(800, 1000, late)
    x = np.where(steps < 50 - late, 1.02 * y, y / 100)
    found = Agreement.of(y, x * 1.0, steps)
    assert found.error < 0.05 and "and size" not in found.words
    x = np.where(steps < 50 - late, 0.01 * y, y)
    assert "and size" in Agreement.of(y, x, steps).words  # wrong only where changes are tiny


def test_three_changes_of_one_sign_are_too_few_for_it():
    """With three changes, the interval of the share of right signs goes down to 0.44."""
    y = np.array([1.0, 2.0, 3.0])
    assert not Agreement.of(y, y, np.arange(3)).words.startswith("trust")
    y = np.arange(1.0, 6.0)
    assert Agreement.of(y, y, np.arange(5)).words.startswith("trust it in sign and size")


def test_first_order_gets_better_as_steps_get_smaller():
    errors = []
    for rate in (1e-2, 5e-3):
        found = agreements(trained_result(n_steps=2, rate=rate, resolve=()))["predicted_sgd"]
        assert found["unlearn"].same_sign == 1
        errors.append(found["unlearn"].error)
    assert errors[1] < 0.55 * errors[0]  # the rest is of second order in the step


def test_an_outcome_says_what_was_removed_and_what_it_cost():
    values = np.array([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0], [3.0, 2.5, 3.1]])
    found = Outcome.of(values, ["unlearn", "retain", "general"])
    assert found.change == pytest.approx({"unlearn": 2.0, "retain": 0.5, "general": 0.1})
    assert found.cost == pytest.approx(0.25) and found.verdict == "forgets, some harm"
    assert Outcome.of(values[::-1], ["unlearn", "retain", "x"]).verdict == "does not forget"
    values[-1, 1] = np.inf
    assert Outcome.of(values, ["unlearn", "retain", "x"]).verdict == "undefined (NaN)"


def test_the_outcome_in_a_sentence():
    dataset = step_dataset(n_steps=3, every=5)
    dataset["risk_value"][:] = [[1, 2], [2, 2], [3, 2.5]]
    assert outcome_sentence(dataset) == (
        "Trained on ga, from step 0 to 10 the forget risk rises by 2 (from 1), the retain risk "
        "rises by 0.5 (from 2); for a unit rise of the forget risk, the retain risk rises by 0.25: "
        "forgets, some harm."
    )
    dataset["risk_value"][2, 1] = 1.5
    assert "falls by 0.5 (from 2), at no cost elsewhere" in outcome_sentence(dataset)


# ---- table, files ----


def test_a_long_table_of_objectives_has_the_same_ones_at_both_steps():
    many = tuple(f"wga(alpha={i})" for i in range(101))
    dataset = step_dataset(many, n_steps=3, resolve=(), weights=False)
    blocks = verdicts(dataset)
    at = next(i for i, block in enumerate(blocks) if block.kind == "table" and i)
    first, last = ([r[0] for r in blocks[at].rows if r[1] == step] for step in ("0", "2"))
    assert first == last and len(first) == 100 and {many[0], many[-1]} <= set(first)
    said = "100 of 101 objectives are shown; summary.csv and results.nc hold all."
    assert blocks[at + 1].text == said


def test_a_long_table_of_live_measures_names_the_files_of_a_training():
    dataset = step_dataset(n_steps=201, resolve=(), weights=False)
    axes = ("step", "metric", "measured_set")
    for name in ("measure", "measure_low", "measure_high"):
        dataset[name] = (axes, np.ones((201, 1, 1)))
    dataset = dataset.assign_coords(
        metric=["nll"], measured_set=["forget"], statistic=("metric", ["mean"])
    )
    said = "200 of 201 steps are shown; summary.csv and results.nc hold all."
    assert said in [block.text for block in measured(dataset, []) if block.kind == "text"]


def test_the_table_lists_evenly_spaced_steps():
    dataset = step_dataset(OBJECTIVES[:2], n_steps=41, every=5)
    text = text_of(render_steps(dataset))
    assert text.startswith("Trained on ga to step 200, measured at 41 steps on 12 forget rows")
    rows = re.findall(
        r"^ +(\d+) +(\S+) +(\S+) +(\S+) +(\S+)", text.split("All objectives")[0], re.M
    )
    assert [int(row[0]) for row in rows] == [0, 25, 50, 75, 100, 125, 150, 175, 200]
    assert len(rows) == ROWS
    read = Steps.of(dataset)
    assert float(rows[1][1]) == pytest.approx(read.values[5, 0], rel=1e-3)
    assert float(rows[1][3]) == pytest.approx(read.effects[5, 0, 0], rel=1e-2)
    assert "All objectives at step 200" in text and "wga(alpha=1)" in text
    assert "First order against 40 measured changes" in text
    untrained = text_of(render_steps(step_dataset(trained=False)))
    assert untrained.startswith("Effects of ga to step 12") and "by SGD" not in untrained


@pytest.mark.slow
def test_a_report_of_steps_is_figures_tokens_and_a_table_over_steps(tmp_path):
    axes = ("group", "sample", "token")
    dataset = step_dataset(OBJECTIVES[:2], n_steps=3, resolve=axes, weights=False)
    write_report(dataset, tmp_path)
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {f"{stem}.{end}" for stem in STEMS[:-1] for end in ("png", "svg")}
    assert "[red]" in (tmp_path / "tokens.html").read_text(encoding="utf-8")
    table = pd.read_csv(tmp_path / "summary.csv").set_index(["step", "objective"])
    assert len(table) == 6
    totals = total(dataset)
    for k, objective in enumerate(OBJECTIVES[:2]):
        one = table.xs(objective, level="objective")
        np.testing.assert_allclose(one["g_effect_retain"], totals[:, k, 1])
        np.testing.assert_allclose(one["risk_value_retain"], dataset["risk_value"][:, 1])
        np.testing.assert_allclose(
            one["predicted_update_unlearn"], dataset["predicted_update"][:, 0]
        )
        np.testing.assert_allclose(one["loss"], dataset["loss"][:, k])
        np.testing.assert_allclose(one["learning_rate"], dataset["learning_rate"])


def test_commands_that_show_tokens_take_the_last_step(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = step_dataset(n_steps=3, resolve=("sample", "token"), weights=False, n_forget=2)
    for name, result in (("run", dataset), ("last", dataset.isel(step=-1))):
        (tmp_path / name).mkdir()
        result.to_netcdf(tmp_path / name / "results.nc", engine="h5netcdf")
    printed = []
    for name in ("run", "last"):
        assert main(["tokens", name, "--samples", "2"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "forget row 1" in printed[0]
    asked = []
    monkeypatch.setattr(
        "geffect_fast.metrics.optimal_weights.optimal_weights", lambda r, **_: asked.append(r)
    )
    assert main(["weights", "run", "--removal", "-1", "--forget", "x", "--out", "w.jsonl"]) == 2
    assert asked[0].identical(gf.open_run("run").isel(step=-1))

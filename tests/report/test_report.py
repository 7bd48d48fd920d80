"""Reports of one profile: tables, findings and plots, for ordinary and awkward results."""

import colorsys
import re

import numpy as np
import pytest
from html_tree import text
from matplotlib.colors import to_hex, to_rgb
from report_views import ORDER, checked, section, sections, text_of, words_of
from synthetic import OBJECTIVES, make_dataset

from geffect_fast.report import write_report
from geffect_fast.report.figures.layer_maps import layer_maps
from geffect_fast.report.figures.profile import instances_figure, layers_figure
from geffect_fast.report.figures.style import COLOURS, LINE_UNWANTED, LINE_WANTED
from geffect_fast.report.html.page import page_html
from geffect_fast.report.summary.effects import by_place, by_sample
from geffect_fast.report.summary.findings import findings
from geffect_fast.report.tables.profile import render_profile
from geffect_fast.report.tables.result import tables_and_sentences
from geffect_fast.report.tokens.colours import colour
from geffect_fast.results.by_rows import sum_positions


def make(**kwargs):
    return make_dataset(objectives=OBJECTIVES[:3], **kwargs)


def awkward():
    """Results that break naive reports, by name."""
    zero = make()
    zero["g_effect"][:] = 0
    zero["cosine"][:] = np.nan
    nan = make()
    nan["g_effect"][2] = np.nan
    infinite = make()
    infinite["g_effect"][0, 1, 2, 3] = np.inf
    all_nan = make()
    all_nan["g_effect"][:] = np.nan
    ties = make()
    ties["g_effect"][:] = -1.0
    rising = make()
    rising["g_effect"][:] = 1.0
    unnamed = make()
    unnamed["question"] = ("sample", [""] * unnamed.sizes["sample"])
    return {
        "zero": zero,
        "nan": nan,
        "infinite": infinite,
        "all nan": all_nan,
        "ties": ties,
        "rising": rising,
        "no questions": unnamed,
        "no norms": make().drop_vars(["cosine", "grad_norm", "risk_grad_norm"]),
        "one objective": make_dataset(objectives=("ga",)),
        "one row": make(n_forget=1, n_retain=0),
        "probes": make(risks=("unlearn", "retain", "general", "code")),
        "only parameters": make(resolve=("parameter",)),
        "only samples": make(resolve=("sample",)),
        "only totals": make(resolve=()),
        "tokens": make(resolve=("group", "sample", "token")),
    }


def test_what_is_covered_is_printed():
    def words(result):
        return words_of(render_profile(result))

    result = make()
    line = "Covered: 15 of 15 trainable parameters, 12,345 of 12,345 elements; left out: 2 frozen"
    assert line in words(result)
    assert "the shares add up to plain autograd's whole gradient" in words(result)
    result.attrs["coverage_checked"] = 0
    assert "Not compared with the whole gradient" in words(result)
    del result.attrs["covered_parameters"]  # a run of an older version
    assert "Covered" not in words(result)


@pytest.mark.parametrize("name", awkward())
def test_any_result_is_reported(tmp_path, name):
    dataset = awkward()[name]
    before = dataset.copy(deep=True)
    summed = sum_positions(dataset)
    text = text_of(render_profile(summed), 140)
    assert all(objective in text for objective in dataset.objective.values)
    sentences = findings(summed)
    assert len(sentences) == 2
    assert all(s.endswith(".") and "nan" not in s and "\n" not in s for s in sentences)
    write_report(dataset, tmp_path)
    assert (tmp_path / "summary.csv").read_text().count("\n") == 1 + dataset.sizes["objective"]
    placed = bool({"parameter", "group"} & set(dataset.g_effect.dims))
    assert (tmp_path / "plots" / "layers.png").exists() == placed
    assert (tmp_path / "plots" / "instances.png").exists() == ("sample" in dataset.g_effect.dims)
    tokens = "token" in dataset.g_effect.dims
    assert (tmp_path / "tokens.html").exists() == tokens
    found = {"answer", "verdicts", "table", "signs", "made"}
    found |= {"layers"} if placed else set()
    found |= {"instances"} if "sample" in dataset.g_effect.dims else set()
    found |= {"tokens"} if tokens else set()
    found |= {"cosines"} if "cosine" in dataset else set()
    page = checked((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert sections(page) == [name for name in ORDER if name in found]
    assert dataset.identical(before)


def test_the_table_shows_effects_cosines_and_verdicts(dataset):
    dataset["g_effect"][:] = 0
    dataset["g_effect"][:, 0, 0, 4] = -1.5
    dataset["g_effect"][:, 1, 0, 4] = 0.25
    dataset["cosine"][:] = [-0.75, 0.125]
    text = text_of(render_profile(dataset), 140)
    line = next(line for line in text.splitlines() if line.split()[:1] == ["ga"])
    assert line.split()[1:3] == ["-1.5", "+0.25"]
    assert "+0.12" in line and "-0.75" in line and "forgets, spares" in line
    assert "-lr·e" in text and "do not compare" in text


def test_the_group_table_adds_to_a_hundred(dataset):
    text = text_of(render_profile(dataset), 140)
    lines = text.split("Where e_u")[1].split("Where e_r")[0].splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ["ga"])
    assert 97 <= sum(abs(float(cell)) for cell in row[1:]) <= 103


def test_instances_are_named_with_row_share_and_question(dataset):
    dataset["g_effect"][:] = 0
    dataset["g_effect"][:, 0, 0, :4] = [-1, -3, 0, 4]
    dataset["g_effect"][:, 1, 0, 5] = 2
    line = next(
        line
        for line in text_of(render_profile(dataset), 140).split("Instances")[1].splitlines()
        if line.split()[:1] == ["ga"]
    )
    assert "1  -38%  What did the author number 1" in line
    assert line.rstrip().endswith("none")  # no row harms another set


def test_the_first_sentence_names_the_best_and_the_worst(dataset):
    dataset["g_effect"][:] = 0
    dataset["g_effect"][:, 0, 0, 0] = [-1, -2, -4, 8, 0]
    dataset["g_effect"][:, 1, 0, 0] = [-0.5, 1, -12, 5, 0]
    dataset["cosine"][:, 0] = [-1, -1, -1, 1, 0]
    what = findings(dataset)[0]
    assert what.startswith("3 of 5 objectives raise the forget risk")
    assert "least cost elsewhere is that of wga(alpha=1): the retain risk falls by 0.5" in what
    assert "highest is that of npo(beta=0.1): the retain risk rises by 3." in what


def test_the_second_sentence_names_part_and_rows(dataset):
    dataset["g_effect"][:] = 0
    place = list(dataset.parameter.values).index("model.layers.3.q_proj.weight")
    dataset["g_effect"][:, 0, place, :5] = [-1, -1, -1, -1, -6]
    where = findings(dataset)[1]
    assert "100 % of the effect on the forget risk sits in the deep blocks" in where
    assert '1 of 12 forget row carries half of it, row 4 ("What did the author number 4' in where


def test_how_to_read_the_signs_stands_before_the_first(dataset):
    printed = text_of(tables_and_sentences(dataset)[0])
    before = " ".join(printed.partition("G-effect of")[0].split())
    assert "strongly negative e_u is what you want" in before
    assert "a negative e_r harms it" in before
    page = checked(page_html({"run": dataset}))
    assert sections(page)[:2] == ["answer", "signs"]
    assert not re.search(r"e_[ur]|[<>-] ?0", text(section(page, "answer")))


def test_undefined_objectives_are_named(dataset):
    dataset["g_effect"][2] = np.nan
    assert "1 undefined (npo(beta=0.1))" in findings(dataset)[0]


def test_plots_are_of_the_numbers(dataset):
    panels = layers_figure(dataset).axes
    effect = by_place(dataset, blocks=True)[1]
    for m, panel in enumerate(panels[:2]):
        shown = panel.images[0].get_array()
        expected = effect[:, m] / np.abs(effect[:, m]).max(axis=1, keepdims=True)
        expected *= [-1, 1][m]  # above 0 is wanted
        np.testing.assert_allclose(shown, expected)
    effect = by_sample(dataset)
    for panel, one in zip(instances_figure(dataset).axes, effect, strict=False):
        points = one.transpose("sample", "risk").values
        good = (points[:, 0] < 0) & (points[:, 1] >= 0)
        wanted, unwanted = panel.collections
        for dots, of, named in ((wanted, good, LINE_WANTED), (unwanted, ~good, LINE_UNWANTED)):
            np.testing.assert_array_equal(dots.get_offsets(), points[of])
            assert to_hex(dots.get_facecolor()[0]) == named


def test_blue_is_wanted_and_orange_is_not(dataset):
    """e_u is wanted below zero, e_r above; lines and marks told apart by name have other hues."""
    dataset["g_effect"][:] = -1.0
    steps = dataset.expand_dims(step=[0, 1]).assign_attrs(trained_objective="ga")
    images = [panel.images[0] for panel in layers_figure(dataset).axes[:2]]
    images += [panel.collections[0] for panel in layer_maps(steps, ["ga"]).axes[:2]]
    cells = [to_hex(image.to_rgba(image.get_array())[1, 1]) for image in images]
    assert cells == [colour(9, "light"), colour(-9, "light")] * 2
    hues = [360 * colorsys.rgb_to_hsv(*to_rgb(each))[0] for each in (LINE_WANTED, LINE_UNWANTED)]
    for each in COLOURS:
        hue, saturation, _ = colorsys.rgb_to_hsv(*to_rgb(each))
        far = min(abs((360 * hue - one + 180) % 360 - 180) for one in hues)
        assert saturation < 0.1 or far > 25, each


def test_what_one_picture_shows_is_drawn_once(dataset):
    dataset["g_effect"][1] = dataset["g_effect"][0]
    titles = [panel.get_title() for panel in instances_figure(dataset).axes if panel.get_visible()]
    first, second, *others = OBJECTIVES
    assert titles == [f"{first} and {second}", *others]
    drawn = text(section(checked(page_html({"run": dataset})), "instances"))
    assert f"{first} and {second}" in drawn and "are shown" not in drawn


def test_plotting_leaves_no_figure_and_no_backend_behind(dataset):
    import matplotlib.pyplot as plt

    before = plt.get_backend()
    layers_figure(dataset)
    assert plt.get_backend() == before and not plt.get_fignums()

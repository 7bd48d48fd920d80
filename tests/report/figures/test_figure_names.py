"""Names with characters that matplotlib takes for a formula stand unchanged in every figure."""

from __future__ import annotations

from html import unescape
from xml.etree import ElementTree

import numpy as np
import pytest
from step_results import step_dataset
from synthetic import make_dataset
from token_results import drawn_shares, token_result

import geffect_fast as gf
from geffect_fast.report import write_report
from geffect_fast.report.figures.compare import comparison_figures
from geffect_fast.report.figures.frontier import frontier_figure
from geffect_fast.report.figures.steps import step_figures
from geffect_fast.report.figures.style import blank_figure, save_figure
from geffect_fast.report.html.page import page_html

BROKEN, VALID = r"ga $\frac{$", "npo $x_2$"
RISKS = ("unlearn", "retain", r"cost $\{$")


def words(figure, folder):
    """The texts of a figure as SVG, one after the other."""
    save_figure(figure, folder / "x", ("svg",))
    svg = (folder / "x.svg").read_text(encoding="utf-8")
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return " ".join("".join(each.itertext()) for each in found)


def test_a_profile_and_its_page(tmp_path):
    write_report(make_dataset((BROKEN, VALID), risks=RISKS), tmp_path)
    page = unescape((tmp_path / "report.html").read_text())
    assert page.count(BROKEN) > 3 < page.count(VALID) and page.count(RISKS[2]) > 3
    assert (tmp_path / "plots/layers.png").exists() and (tmp_path / "plots/instances.png").exists()


@pytest.mark.slow
def test_steps(tmp_path):
    dataset = step_dataset((BROKEN, VALID), n_steps=3, risks=RISKS)
    for name, figure in step_figures(dataset).items():
        found = words(figure, tmp_path)
        assert any(label in found for label in (VALID, BROKEN, RISKS[2])), name
    assert page_html({"a $1$": dataset}).count(BROKEN) > 3


@pytest.mark.slow
def test_runs_side_by_side(tmp_path):
    runs = {r"run $\alpha": step_dataset((BROKEN,), n_steps=3, risks=RISKS), "b $": None}
    runs["b $"] = step_dataset((VALID,), n_steps=3, seed=1, risks=RISKS)
    runs = {f"{name}$": run for name, run in runs.items()}
    for name, figure in comparison_figures(gf.compare(runs)).items():
        found = words(figure, tmp_path)
        assert all(run in found for run in runs), (name, found)
    assert page_html(runs).count(r"run $\alpha$") > 3


def test_a_sweep(swept, tmp_path):
    dataset = swept()
    named = [f"{name} $\\frac{{$" for name in map(str, dataset["objective"].values)]
    write_report(dataset.assign_coords(objective=named), tmp_path)
    assert {"sweep.png", "pareto.png"} <= {file.name for file in (tmp_path / "plots").iterdir()}


def test_the_frontier(tmp_path):
    result = token_result(drawn_shares([9, 14, 6]), {VALID: 0.4, BROKEN: 1.2})
    best = gf.optimal_weights(result, retain_budget=0.002)
    found = words(frontier_figure(result, best), tmp_path)
    assert BROKEN in found and VALID in found


@pytest.mark.parametrize("scale", ["log", "symlog"])
def test_powers_of_ten_stay_powers(scale, tmp_path):
    figure = blank_figure(4, 3)
    panel = figure.subplots()
    panel.plot(np.geomspace(1e-6, 1e6, 5), label=BROKEN)
    panel.set_yscale(scale, **({"linthresh": 1e-3} if scale == "symlog" else {}))
    panel.legend()
    found = words(figure, tmp_path)
    assert BROKEN in found and "10⁶" in found and "10⁻" in found and "mathdefault" not in found


def test_what_all_numbers_are_multiplied_with_is_a_power_of_ten(tmp_path):
    figure = blank_figure(4, 3)
    panel = figure.subplots()
    panel.plot([-2e-7, 3e-7])
    panel.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    assert {"×10⁻⁷", "−2", "3"} <= {*words(figure, tmp_path).split()}

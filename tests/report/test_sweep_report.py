"""Reports of a sweep: the best of each family, the front, and plots, for awkward sweeps too."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from html_tree import find, text
from report_views import checked, section
from report_views import text_of as printed
from synthetic import make_dataset

from geffect_fast.measure import sweep as sweep_module
from geffect_fast.report import write_report
from geffect_fast.report.figures.result import result_drawings
from geffect_fast.report.figures.style import drawn
from geffect_fast.report.figures.sweep import pareto_figure, sweep_figure
from geffect_fast.report.summary.effects import thinned
from geffect_fast.report.summary.findings import findings
from geffect_fast.report.summary.objectives import write_summary
from geffect_fast.report.summary.sweep import HIGHLIGHTS, Swept, highlights, is_sweep
from geffect_fast.report.tables.sweep import FRONT_SHOWN, render_sweep


def text_of(dataset):
    return printed(render_sweep(dataset), 80)


FEW = ["wga(alpha=1:2:2)", "npo(beta=0.1:10:2,log)", "ga"]


def awkward(swept):
    """Sweeps that break naive reports, by name."""
    broken = swept()
    broken["g_effect"][:4] = np.nan
    broken["g_effect"][5, 0] = np.inf
    broken["pareto"] = sweep_module.pareto_front(broken)
    return {
        "broken": broken,
        "samples": swept(FEW, resolve=("sample",)),
        "zero": swept(e_u=0, e_r=0),
        "one value": swept(["wga(1:1:1)"]),
        "one name, log and not": swept(["wtnpo(alpha=1:8:3,log)", "wga(0:3:4)"]),
        "sizes apart": swept(
            ["wga(1:2:2)", "npo(1:2:2)"], e_u=[-1e-3, -2e-3, -1e3, -1e2], e_r=[1e-9, 0, 1e2, -1e5]
        ),
        "many families": swept([f"wga(alpha={i}:{i + 1}:3)" for i in range(0, 24, 2)]),
        "a large grid": swept(["wtnpo(0.1:4:5,log, 0:2:9)"]),
        "places and probes": swept(
            FEW, resolve=("parameter",), risks=("unlearn", "retain", "more")
        ),
    }


WRITTEN = ("broken", "samples", "one value", "places and probes")
"""Sweeps whose page and pictures are written. For the others, figures are only made and laid out,
which is the step that many lines and names can break."""


@pytest.mark.slow
def test_any_sweep_is_reported(tmp_path, swept):
    for name, dataset in awkward(swept).items():
        folder = tmp_path / name
        folder.mkdir()
        before = dataset.copy(deep=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            lines = text_of(dataset).splitlines()
            if name in WRITTEN:
                write_report(dataset, folder)
                check_files(name, folder)
            else:
                write_summary(dataset, folder / "summary.csv")
                for figure in drawn(result_drawings(dataset, dataset)).values():
                    figure.place()
        assert max(map(len, lines)) <= 80, name
        assert len(findings(dataset)) == 2
        assert dataset.identical(before)
        table = pd.read_csv(folder / "summary.csv")
        assert list(table.objective) == list(dataset.objective.values)
        assert list(table.sweep) == list(dataset.sweep.values)
        assert list(table.pareto) == list(dataset.pareto.values)
        for hyper in (str(c) for c in dataset.coords if str(c).startswith("hyper_")):
            np.testing.assert_allclose(table[hyper], dataset[hyper])


def check_files(name, folder):
    """Check that the page and pictures belong to a sweep of this name."""
    root = checked((folder / "report.html").read_text(encoding="utf-8"))
    assert "hyper-parameters" in text(find(section(root, "curves"), "h2")[0])
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert ("sweep.png" in plots) == (name != "one value") and "pareto.png" in plots
    assert ("instances.png" in plots) == (name == "samples")
    assert ("layers.png" in plots) == (name == "places and probes")


def test_the_best_of_a_family_are_named(swept):
    dataset = swept(["wga(alpha=1:4:4)", "ga"], e_u=[-4, -3, -2, 1, -7], e_r=[-4, -1, -0.9, 9, -7])
    family = Swept.of(dataset).families[0]
    assert Swept.of(dataset).picks(family) == {
        0: ["strongest removal"],
        2: ["least harm"],  # alpha=4 does no harm and removes nothing
        1: ["least collateral"],
    }
    lines = [line.split() for line in text_of(dataset).splitlines()]
    assert ["strongest", "removal", "alpha=1", "-4", "-4", "1.00"] in lines
    assert ["least", "harm", "alpha=3", "-2", "-0.9", "0.45"] in lines
    assert ["least", "collateral", "alpha=2", "-3", "-1", "0.33"] in lines
    assert ["ga", "-7", "-7", "1.00"] in lines
    assert text_of(dataset).startswith("5 objectives on 12 forget rows: the best of each family")


def test_what_an_objective_is_best_in_is_one_row(swept):
    text = text_of(swept(["wga(alpha=1:2:2)"], e_u=[-4, -3], e_r=[-1, -3]))
    rows = text.partition("Pareto")[0].partition("wga(alpha=1:2:2)")[2]
    words = ["strongest", "removal,", "alpha=1", "-4", "-1", "0.25", "least", "harm,"]
    assert rows.split() == [*words, "least", "collateral"]


def test_values_of_a_grid_stand_together(swept):
    dataset = swept(["wtnpo(1:2:2, 3:4:2)"], e_u=[-1, -2, -3, -4], e_r=[-4, -3, -2, -1])
    text = text_of(dataset)
    line = next(line for line in text.splitlines() if "strongest removal" in line)
    assert line.split()[2:] == ["beta=2,", "alpha=4", "-4", "-1", "0.25"]
    assert "strongest removal" in text and "alpha=3" not in text.split("Pareto")[0]


def test_a_family_without_the_best_says_so(swept):
    assert "undefined (NaN)" in text_of(swept(["wga(1:2:2)"], e_u=np.nan))
    remembers = text_of(swept(["wga(1:2:2)"], e_u=1, e_r=1))
    assert "strongest removal" in remembers and "least" not in remembers.split("Pareto")[0]
    assert "undefined" not in remembers


def test_the_front_is_listed_from_the_strongest_removal_on(swept):
    dataset = swept(["wga(0:4:5)"], e_u=[-1, -5, -3, -4, -2], e_r=[-1, -5, -3, -6, -2])
    front = text_of(dataset).split("Pareto front: 4 not beaten in both removal and harm")[1]
    listed = [line.split()[0] for line in front.splitlines() if line.startswith(" wga")]
    assert listed == [f"wga(alpha={i})" for i in (1, 2, 4, 0)]


def test_a_long_front_is_thinned(swept):
    n = 3 * FRONT_SHOWN
    dataset = swept([f"wga(1:{n}:{n})"], e_u=-1 - np.arange(n), e_r=-np.arange(n))
    text = text_of(dataset)
    assert f"and {2 * FRONT_SHOWN} more, marked in summary.csv" in text
    front = [line.split()[0] for line in text.splitlines() if line.startswith(" wga(alpha=")]
    assert front[0] == f"wga(alpha={n})" and front[-1] == "wga(alpha=1)"
    assert len(front) == FRONT_SHOWN


def test_of_a_long_front_those_that_reinforce_are_left_out(swept):
    n = FRONT_SHOWN + 1
    e_u = np.arange(n) - 2.0
    text = text_of(swept([f"wga(1:{n}:{n})"], e_u=e_u, e_r=e_u))
    front = text.split("Pareto")[1]
    assert front.count(" wga(alpha=") == 2 and f"and {n - 2} more" in front


def test_collateral_of_next_to_no_removal_is_no_merit(swept):
    dataset = swept(["wga(1:4:4)"], e_u=[-10, -1, -0.99, 1], e_r=[-5, -0.1, 4, 9])
    picks = Swept.of(dataset).picks(Swept.of(dataset).families[0])
    assert picks == {0: ["strongest removal"], 1: ["least collateral"], 2: ["least harm"]}


def test_thinning_keeps_the_ends():
    places = np.arange(100)
    assert thinned(places, 100) is places
    kept = thinned(places, 7)
    assert len(kept) == 7 and kept[0] == 0 and kept[-1] == 99 and (np.diff(kept) > 0).all()


def test_only_the_best_take_room_of_their_own(swept):
    dataset = swept(["wtnpo(0.1:4:20,log, 0:2:20)"])
    shown = highlights(dataset)
    assert 1 < shown.sizes["objective"] <= HIGHLIGHTS
    swept_whole = Swept.of(dataset)
    best = set(swept_whole.ranked_front()) | set(swept_whole.picks(swept_whole.families[0]))
    assert set(shown.objective.values) <= {swept_whole.objectives[i] for i in best}
    assert is_sweep(dataset) and not is_sweep(make_dataset())


def test_the_front_goes_through_the_numbers(swept):
    dataset = swept()
    read, (panel,) = Swept.of(dataset), pareto_figure(dataset).axes
    front = read.ranked_front()
    (line,) = (line for line in panel.get_lines() if line.get_drawstyle() == "steps-post")
    np.testing.assert_array_equal(line.get_data(), [read.e_u[front], read.e_r[front]])
    points = [each.get_offsets() for each in panel.collections[: len(read.families)]]
    for family, found in zip(read.families, points, strict=True):
        expected = np.stack([read.e_u[family.at], read.e_r[family.at]], axis=1)
        np.testing.assert_array_equal(found, expected)


def test_axes_and_lines_are_those_of_the_ranges(swept):
    panels = sweep_figure(swept()).axes
    assert len(panels) == 3 * 2  # e_u, e_r and collateral against alpha and beta
    names = {panel.get_xlabel(): panel for panel in panels if panel.get_xlabel()}
    assert set(names) == {"alpha", "beta"}
    assert names["alpha"].get_xscale() == "linear" and names["beta"].get_xscale() == "log"
    labels = {
        name: [line.get_label() for line in panel.get_lines() if line.get_label()[0] != "_"]
        for name, panel in names.items()
    }
    wtnpo = "wtnpo(1:2:2, alpha=3:5:3)"
    assert labels["alpha"] == ["wga(alpha=1:4:4)", f"{wtnpo}: beta=1", f"{wtnpo}: beta=2"]
    assert labels["beta"] == [
        "npo(beta=0.1:10:3,log)",
        *(f"{wtnpo}: alpha={alpha}" for alpha in (3, 4, 5)),
    ]


def test_a_line_goes_through_the_numbers(swept):
    dataset = swept(["wga(1:3:3)"], e_u=[-3, -2, np.nan], e_r=[-1, 1, 2])
    dataset["pareto"] = sweep_module.pareto_front(dataset)
    lines = [panel.get_lines()[0] for panel in sweep_figure(dataset).axes]
    assert all(list(line.get_xdata()) == [1, 2, 3] for line in lines)
    np.testing.assert_equal(lines[0].get_ydata(), [-3, -2, np.nan])
    np.testing.assert_equal(lines[1].get_ydata(), [-1, 1, 2])
    np.testing.assert_allclose(lines[2].get_ydata(), [1 / 3, -0.5, np.nan])

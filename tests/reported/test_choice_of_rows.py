"""Publicly reported errors of plots and intervals: gaps, log axes, degenerate draws, rankings."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from synthetic import make_dataset

import geffect_fast as gf
from geffect_fast.report.figures.curves import draw_lines
from geffect_fast.report.figures.style import blank_figure
from geffect_fast.report.figures.sweep import sweep_figure
from geffect_fast.report.summary.sweep import Swept
from geffect_fast.results.intervals import effect_intervals, stretch

STEPS = np.arange(5)


def drawn(values, low, high, **more):
    """A panel with one line and its band."""
    figure = blank_figure(4, 3)
    panel = figure.subplots()
    bounds = np.array([low, high], dtype=float)[..., None]
    draw_lines(panel, STEPS, {"x": np.array(values)}, title="", words="", bounds=bounds, **more)
    return figure, panel


@pytest.mark.parametrize(
    ("source", "lowest"),
    [
        ("matplotlib/matplotlib#9457", -0.5),  # areas are filled that should stay empty
        ("matplotlib/matplotlib#8623", 0.0),  # the last and the first point are connected
        ("matplotlib/matplotlib#2536", -1e-9),  # the filling stops at a straight line between them
    ],
)
def test_a_band_below_zero_on_a_log_axis_is_filled_to_its_bottom_and_no_further(source, lowest):
    values = np.array([1e3, 1e2, 10.0, 1.0, 1.0])
    low, high = np.append(values[:-1] / 2, lowest), 3 * values
    figure, panel = drawn(values, low, high, positive=True)
    assert panel.get_yscale() == "log", source
    panel.set_ylim(0.1, 1e4)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)

    def shaded(x, y):
        at, up = panel.transData.transform((x, y))
        return picture[int(up), int(at)].mean() < 245

    assert shaded(3.97, 0.15) and shaded(0.03, 700) and shaded(1.5, 60)
    assert not shaded(0.5, 30) and not shaded(2.5, 1500) and not shaded(3.97, 20)


@pytest.mark.parametrize(
    "source", ["matplotlib/matplotlib#1140", "bokeh/bokeh#14256", "MakieOrg/Makie.jl#2845"]
)
def test_a_band_with_a_gap_draws_nothing_there(source):
    """The gap is empty, without lines to the origin or the other bound; a lone step has a bar."""
    values = np.array([5.0, 6, 7, 8, 9])
    low = np.array([4.0, 5, np.nan, 7, -np.inf])
    figure, panel = drawn(values, low, values + 1)
    figure.canvas.draw()
    (band,) = (c for c in panel.collections if isinstance(c, PolyCollection))
    points = np.concatenate([path.vertices for path in band.get_paths()])
    first = points[points[:, 0] <= 1]
    assert first[:, 1].min() == 4 and first[:, 1].max() == 7, source
    assert not (points[:, 0] == 2).any() and not (points[:, 0] == 4).any()
    (bars,) = (c for c in panel.collections if isinstance(c, LineCollection))
    (bar,) = bars.get_segments()
    np.testing.assert_array_equal(bar, [[3, 7], [3, 9]])


def test_draws_that_degenerate_do_not_drag_the_interval():
    """betagouv/ComparIA#470: rounds without an estimate moved a bound off, and the point out."""
    rows = np.stack([np.where(np.arange(12) % 3, -1.0, 1.6), np.full(12, -0.05)])[None]
    found = effect_intervals(rows, ["forget"] * 12, [np.zeros(3)])
    low, point, high = (
        float(found[name][1][0]) for name in ("collateral_low", "collateral", "collateral_high")
    )
    assert high == np.inf  # the forget risk need not rise at all
    rng = np.random.default_rng(5)
    weights = 1 + (rng.multinomial(12, [1 / 12] * 12, size=20_000) - 1) * stretch(12)
    e_u, e_r = weights @ rows[0, 0], weights @ rows[0, 1]
    with np.errstate(divide="ignore"):
        ratio = np.where(e_u < 0, e_r / (e_u * np.abs(e_u) / abs(rows[0, 0].sum())), np.inf)
    assert low == pytest.approx(np.quantile(ratio, 0.025, method="nearest"), rel=0.1)
    assert low <= point == pytest.approx(0.6 / 1.6)


def swept(e_u, noise):
    """A sweep of one family with these totals; its rows differ equally for all values."""
    n = len(e_u)
    names = [f"wga(alpha={i + 1})" for i in range(n)]
    text = f"wga(alpha=1:{n}:{n})"
    dataset = make_dataset(names, resolve=("sample",), n_forget=12, n_retain=0)
    rng = np.random.default_rng(0)
    for i, total in enumerate(e_u):
        own = rng.normal(size=12)
        dataset["g_effect"][i, 0] = total / 12 + noise * (own - own.mean()) / own.std()
        dataset["g_effect"][i, 1] = dataset["g_effect"][i, 0] * 0.1
    found = effect_intervals(dataset["g_effect"].values, ["forget"] * 12, [np.zeros(3)])
    dataset = dataset.assign(found).assign_coords(
        sweep=("objective", [text] * n), hyper_alpha=("objective", np.arange(1.0, n + 1))
    )
    dataset.attrs["sweeps"] = json.dumps({text: {"alpha": False}})
    return dataset.assign(pareto=gf.pareto_front(dataset))


def test_neighbours_in_a_ranking_are_alike_and_the_distant_are_not():
    """embeddings-benchmark/mteb#5208: 176 of 180 neighbours are no different, yet are ranked."""
    read = Swept.of(swept([-1.0, -0.98, -0.96, -0.3], 0.005))
    best, *_ = read.picks(read.families[0]).values()
    assert best[0] == "strongest removal (3 alike)"
    apart = Swept.of(swept([-1.0, -0.98, -0.96, -0.3], 1e-5))
    assert next(iter(apart.picks(apart.families[0]).values()))[0] == "strongest removal"


def test_an_infinite_interval_leaves_the_axes_finite():
    """mardani72/Hyper-Parameter_optimization#2: Axis limits cannot be NaN or Inf."""
    dataset = swept([-1.0, -0.5, -0.01], 0.05)
    assert np.isinf(dataset["collateral_high"]).any()
    figure = sweep_figure(dataset)
    figure.canvas.draw()
    assert all(np.isfinite(panel.axis()).all() for panel in figure.axes)

"""Reports draw, print and respect the intervals by the choice of the rows."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from models import build, samples
from report_views import text_of
from step_results import step_dataset
from synthetic import make_dataset

import geffect_fast as gf
from geffect_fast.report.figures.compare import comparison_figures
from geffect_fast.report.figures.frontier import frontier_figure
from geffect_fast.report.figures.profile import mark_noise
from geffect_fast.report.figures.steps import step_figures
from geffect_fast.report.figures.style import blank_figure
from geffect_fast.report.figures.sweep import BARS, pareto_figure, sweep_figure
from geffect_fast.report.html.blocks import HeatMap
from geffect_fast.report.html.profile import full_table, read_cosines
from geffect_fast.report.html.steps import full_table as steps_table
from geffect_fast.report.summary.effects import by_place, place_half_widths
from geffect_fast.report.summary.findings import findings
from geffect_fast.report.summary.objectives import summarise, verdict_of
from geffect_fast.report.summary.run_findings import comparison_finding
from geffect_fast.report.summary.runs import comparison_intervals, comparison_rows, write_comparison
from geffect_fast.report.summary.step_findings import outcome_sentence, turning_sentence
from geffect_fast.report.summary.steps import Steps
from geffect_fast.report.tables.weights import render_weights
from geffect_fast.results.intervals import Z, cosine_interval, effect_intervals, stretch

BOTH = ["unlearn", "retain"]


def with_intervals(dataset, *, narrow=1.0):
    """A made-up result with the intervals of its rows, each `narrow` of the way to their mean."""
    effect = dataset["g_effect"]
    for name in ("forget", "retain"):
        own = effect.where(effect["set"] == name)
        effect = effect.where(
            effect["set"] != name, own.mean("sample") * (1 - narrow) + own * narrow
        )
    dataset = dataset.assign(g_effect=effect.transpose(*dataset["g_effect"].dims))
    rest = [d for d in effect.dims if d not in ("step", "objective", "risk", "sample")]
    rows = dataset["g_effect"].sum(rest).transpose(..., "objective", "risk", "sample").values
    lead = ("step",) if "step" in effect.dims else ()
    spreads = [np.zeros(5)] * (effect.sizes["risk"] - 1)
    each = [
        effect_intervals(of, dataset["set"].values.tolist(), spreads)
        for of in rows.reshape(-1, *rows.shape[-3:])
    ]
    for name, (dims, _) in each[0].items():
        values = np.stack([found[name][1] for found in each])
        values = values if lead else values[0]
        dataset[name] = ((*lead, *([dims] if isinstance(dims, str) else dims)), values)
    return dataset.assign_attrs(interval_level=0.95)


def with_risks(path, spread, *, objective="ga", seed=0):
    """A step result with intervals: risks `(S, 2)`, and the changes of the risks by three rows."""
    dataset = step_dataset((objective,), n_steps=len(path), weights=False, seed=seed)
    dataset = with_intervals(dataset)
    dataset["risk_value"][:] = path
    spread = np.asarray(spread, dtype=float)
    dataset["risk_value_spread"] = (("step", "risk", "risk_sample"), spread)
    off = Z * np.sqrt(np.square(spread).sum(-1))
    for side, sign in (("low", -1), ("high", 1)):
        dataset[f"risk_value_{side}"] = dataset["risk_value"] + (("step", "risk"), sign * off)[1]
    return dataset


# ---- sentences ----


def turning(low, high, e_u=-1.0):
    n = len(low)
    effects = np.stack([np.full(n, e_u), -(np.array(low) + np.array(high)) / 2], -1)[:, None]
    bounds = np.array([low, high], dtype=float)[:, :, None]
    read = Steps(
        np.arange(n) * 10, ["ga"], BOTH, effects, np.ones((n, 2)), collateral_bounds=bounds
    )
    return turning_sentence(read)


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        # before and after do not overlap
        ([0.1, 0.2, 1.4, 1.9], [0.6, 0.9, 1.8, 2.1], "From step 20 on"),
        # the same costs, with wider intervals around them
        ([-0.3, -0.1, 0.9, 0.8], [1.0, 1.2, 2.3, 2.9], "At 1 of 4 probed steps"),
        ([0.1, 0.7, 1.4, 1.9], [0.6, 1.3, 1.8, 2.1], "(between steps 0 and 20 these"),
        ([0.1, 0.2, 0.3, 0.4], [0.6, 0.9, 0.9, 1.0], "At every probed step a further small step"),
        ([0.1, 0.2, 0.3, 0.4], [1.6, 1.9, 1.9, 1.1], "At no probed step do these rows tell"),
        ([1.1, 1.2, 1.3, 1.4], [1.6, np.inf, 1.9, 1.5], "At no probed step does a further"),
        ([0.1, 0.2, 0.3, 0.4], [0.6, 0.9, 0.9, 1.1], "first at step 30, these rows do not"),
    ],
)
def test_a_turn_is_said_where_the_intervals_before_and_after_are_apart(low, high, says):
    said = turning(low, high)
    assert says in said
    assert ("From step" in said) == (says.startswith(("From", "(between")))
    if says.startswith("From"):
        assert "would rise by 1.6 [1.4, 1.8]" in said


@pytest.mark.parametrize(
    ("c", "effect", "interval", "expected"),
    [
        (-1.0, -3.0, (-9.0, -0.1), (-1.0, -1.0)),  # -ga- is along its risk, whatever the rows
        (-0.01, -1.0, (-2.0, -0.5), (-0.02, -0.005)),  # nearly orthogonal: as the effect
        (-0.6, -1.0, (-2.0, 1.0), (-1.2 / math.hypot(1.2, 0.8), 0.6)),
        (0.6, 2.0, (0.0, 4.0), (0.0, 1.2 / math.hypot(1.2, 0.8))),
    ],
)
def test_a_cosine_moves_along_its_risk(c, effect, interval, expected):
    assert cosine_interval(c, effect, interval) == pytest.approx(expected, rel=1e-3)
    assert all(map(math.isnan, cosine_interval(c, 0.0, interval)))
    assert all(map(math.isnan, cosine_interval(c, effect, (math.nan, math.nan))))


def test_an_interval_of_a_cosine_is_that_of_drawing_its_rows_anew():
    """Rows differ along the risk; the reference is the cosine of each draw, from the vectors."""
    rng = np.random.default_rng(3)
    risk = np.zeros(6)
    risk[0] = 1.0
    rows = np.outer(-1 - 0.8 * rng.random(40), risk)
    rows[:, 0] += 0.8 * rng.normal(size=40)
    rows[:, 1:] += 1.5  # the same in all other directions
    g = rows.sum(0)
    c = float(g @ risk / np.linalg.norm(g))
    counts = rng.multinomial(40, [1 / 40] * 40, size=4000)
    drawn = (1 + (counts - 1) * stretch(40)) @ rows
    expected = np.quantile(drawn @ risk / np.linalg.norm(drawn, axis=1), [0.025, 0.975])
    interval = np.quantile(drawn @ risk, [0.025, 0.975])
    found = cosine_interval(c, float(g @ risk), tuple(interval))
    np.testing.assert_allclose(found, expected, atol=0.05 * np.ptp(expected))


def test_cosines_are_read_where_all_of_the_interval_says_so():
    given = {"unlearn": -0.3, "retain": -0.2, "probe": 0.5}
    assert read_cosines(given, {}) == "removes, costs the rest"
    narrow = {"unlearn": (-0.4, -0.2), "retain": (-0.3, -0.11), "probe": (0.4, 0.6)}
    assert read_cosines(given, narrow) == "removes, costs the rest"
    wide = {"unlearn": (-0.6, -0.05), "retain": (-0.35, -0.05), "probe": (0.4, 0.6)}
    assert read_cosines(given, wide) == (
        "removes or not: within noise, harms the rest or not: within noise"
    )
    both = {"unlearn": 0.05, "retain": 0.2, "probe": 0.5}
    assert read_cosines(both, {}) == "hardly touches it, helps the rest"


def test_a_verdict_holds_the_cosine_to_its_interval():
    effects, cosines = {"unlearn": -1.0, "retain": 0.1}, {"unlearn": -0.15, "retain": 0.1}

    def verdict(cosine):
        return verdict_of(effects, cosines, -0.1, 0.0, (-1.1, -0.9), (-0.2, -0.05), cosine)

    assert verdict((-0.2, -0.12)) == verdict((math.nan, math.nan)) == "forgets, spares"
    assert verdict((-0.2, -0.05)) == "perhaps hardly forgets"
    cosines["unlearn"] = -0.05
    assert verdict((-0.09, -0.02)) == "hardly forgets"


def test_an_outcome_says_no_direction_within_noise():
    """Rows that move a rise by s_i make it uncertain by Z |s|, here 1.96 * 5 and 1.96 * 0.5."""
    path = [[1, 2], [2, 2], [31, 2.5]]
    spread = np.zeros((3, 2, 3))
    spread[2, 0], spread[2, 1] = [3, 4, 0], [0.3, 0, -0.4]
    said = outcome_sentence(with_risks(path, spread))
    assert f"the forget risk rises by 30 [{30 - 5 * Z:.3g}, {30 + 5 * Z:.3g}] (from 1)" in said
    assert "the retain risk moves within noise, by +0.5 [-0.48, 1.48] (from 2)" in said
    assert "at a cost elsewhere within noise" in said
    spread[2, 1] /= 10
    said = outcome_sentence(with_risks(path, spread))
    assert "the retain risk rises by 0.5 [0.402, 0.598] (from 2)" in said
    assert "for a unit rise of the forget risk, the retain risk rises by 0.017 [" in said


def compared(rises, size):
    """Runs whose forget risk rises by these numbers; rows of its own move each one by `size`."""
    runs = {}
    for i, (name, rise) in enumerate(rises.items()):
        spread = np.zeros((2, 2, 3))
        spread[1, 0, i] = size
        path = [[1, 1], [1 + rise, 1 + abs(rise) / 2]]
        runs[name] = with_risks(path, spread, objective=name, seed=i)
    both = gf.compare(runs)
    return both, comparison_finding(both)


def test_no_run_removes_most_within_noise():
    rises = {"ga": 2.0, "gd": 1.9}
    # the difference of 0.1 is off by Z sqrt(2) size
    assert "Of 2 runs, ga raises the forget risk most, by 2." in compared(rises, 0.03)[1]
    said = compared(rises, 0.05)[1]
    assert "All 2 runs raise the forget risk, alike as far as these rows tell" in said
    assert "most" not in said.split(".")[0]


def test_a_rise_within_noise_is_none():
    said = compared({"ga": 2.0, "gd": 0.1, "npo(beta=0.1)": -2.0}, 0.06)[1]
    assert "The forget risk does not rise in npo(beta=0.1)." in said
    assert "These rows do not tell whether the forget risk rises in gd" in said


def test_a_part_is_the_largest_as_far_as_rows_tell():
    """Two parts have 51 and 49 %; their rows differ much or not at all."""
    base = make_dataset(["ga"], resolve=("group", "sample"), n_forget=12, n_retain=0)
    parts = [str(group) for group in base["group"].values]
    rows = np.zeros((len(parts), 12))
    rows[parts.index("deep")], rows[parts.index("shallow")] = -0.51, -0.49
    wave = np.where(np.arange(12) % 2, 0.3, -0.3)
    for noisy in (False, True):
        rows[parts.index("deep")] = -0.51 + noisy * wave
        base["g_effect"][0, 0] = rows
        said = findings(with_intervals(base))[1]
        assert "51 % of the effect on the forget risk sits in the deep blocks" in said
        assert ("these rows do not tell that from what sits in the shallow blocks" in said) == noisy


# ---- tables ----


def test_the_comparison_has_the_intervals_of_its_columns(tmp_path):
    both, _ = compared({"ga": 2.0, "gd": 1.0}, 0.1)
    rows, found = comparison_rows(both), comparison_intervals(both)
    off = Z * 0.1
    for row, of in zip(rows, found, strict=True):
        rise = row["rise_unlearn"]
        assert of["rise_unlearn"] == pytest.approx((rise - off, rise + off))
        assert of["rise_retain"] == pytest.approx((row["rise_retain"],) * 2)
        risk = row["risk_unlearn"]
        assert of["risk_unlearn"] == pytest.approx((risk - off, risk + off))
        # cost = rise_retain / rise_unlearn moves by -cost / rise_unlearn times a move of
        # rise_unlearn
        assert of["cost"] == pytest.approx(
            (row["cost"] * (1 - off / rise), row["cost"] * (1 + off / rise))
        )
        run = both.sel(run=row["run"], risk="retain")
        assert of["sum_of_effects_retain"] == pytest.approx(
            (float(run.g_effect_low.sum()), float(run.g_effect_high.sum()))
        )
    write_comparison(both, tmp_path)
    table = pd.read_csv(tmp_path / "summary.csv")
    assert list(table)[: len(rows[0])] == list(rows[0])  # the existing columns come first
    added = {f"{name}_{side}" for name in found[0] for side in ("low", "high")}
    assert set(list(table)[len(rows[0]) :]) == added
    np.testing.assert_allclose(table["cost_high"], [of["cost"][1] for of in found])


def test_full_tables_have_an_interval_beside_each_number():
    dataset = with_intervals(make_dataset(["ga", "gd"]))
    table = full_table(dataset)[0]
    for cells, row in zip(table.rows, summarise(dataset), strict=True):
        low, high = row.intervals["retain"]
        assert cells[table.head.index("e_r")].endswith(f" [{low:+.4g}, {high:+.4g}]")
        low, high = row.collateral_interval
        assert cells[table.head.index("collateral")].endswith(f" [{low:.3f}, {high:.3f}]")
    spread = np.zeros((2, 2, 3))
    spread[1, 0] = [0.03, 0, 0.04]
    steps = with_risks([[1, 2], [3, 2.5]], spread)
    table = steps_table(steps)[0]
    last = dict(zip(table.head, table.rows[1], strict=True))
    assert last["R_u"] == f"3 [{3 - Z * 0.05:.4g}, {3 + Z * 0.05:.4g}]"
    change = float(steps["measured_change"][1, 0])
    assert last["ΔR (u)"] == f"{change:.4g} [{change - Z * 0.05:.4g}, {change + Z * 0.05:.4g}]"
    low, high = (float(steps[f"g_effect_{side}"][1, 0, 1]) for side in ("low", "high"))
    assert last["e_r"].endswith(f" [{low:.4g}, {high:.4g}]")


# ---- plots ----


def shaded(panel):
    """Bounds of the bands of a panel, `(2, n)` each."""
    found = []
    for band in panel.collections:
        if isinstance(band, PolyCollection):
            points = np.unique(band.get_paths()[0].vertices, axis=0)
            x = np.unique(points[:, 0])
            ends = [points[points[:, 0] == at, 1] for at in x]
            found.append(np.array([[e.min() for e in ends], [e.max() for e in ends]]))
    return found


def widths_by_hand(dataset, part):
    """Half of the interval of one group's effects, `(step, risk)`, from its rows."""
    effect = dataset["g_effect"].isel(objective=0)
    effect = effect.where(effect["group"] == part, drop=True).sum("parameter")
    total = 0.0
    for name, n in (("forget", 12), ("retain", 3)):
        own = effect.values[..., (effect["set"] == name).values]
        total = total + own.var(axis=-1) * n * stretch(n) ** 2
    return Z * np.sqrt(total) * [2, 1]


def test_curves_over_steps_are_shaded_by_their_intervals():
    dataset = with_risks(np.ones((4, 2)) + np.arange(4)[:, None], np.full((4, 2, 3), 0.1))
    figures = step_figures(dataset)
    for m, panel in enumerate(figures["effects"].axes):
        (band,) = shaded(panel)
        for side, found in zip(("low", "high"), band, strict=True):
            np.testing.assert_allclose(found, dataset[f"g_effect_{side}"][:, 0, m], rtol=1e-6)
    bands = shaded(figures["risks"].axes[0])
    np.testing.assert_allclose(bands[1][1], dataset["risk_value_high"][:, 1])
    for name in ("effects", "risks", "groups", "prediction"):
        said = figures[name].get_suptitle()
        assert "Shaded: 95 % intervals by the choice of the" in said, name
    groups = figures["groups"].axes
    values = dataset["g_effect"].isel(objective=0)
    deep = values.where(values["group"] == "deep", drop=True).sum(["parameter", "sample"])
    expected = widths_by_hand(dataset, "deep")
    place = [line.get_label() for line in groups[0].get_lines()].index("deep")
    for m, panel in enumerate(groups):
        low, high = shaded(panel)[place]
        np.testing.assert_allclose(high, deep[:, m] + expected[:, m], rtol=1e-6)
        np.testing.assert_allclose(low, deep[:, m] - expected[:, m], rtol=1e-6)
    plain = step_figures(step_dataset(n_steps=4))
    assert not any(shaded(panel) for panel in plain["effects"].axes + plain["risks"].axes)
    assert "Shaded" not in plain["effects"].get_suptitle()


def test_curves_of_several_runs_are_shaded_and_paths_end_in_bars():
    runs = {
        name: with_risks([[1, 1], [2, 1.5]], np.full((2, 2, 3), 0.1) * [[[0]], [[1]]], seed=i)
        for i, name in enumerate(("one", "two"))
    }
    both, figures = gf.compare(runs), comparison_figures(gf.compare(runs))
    for i, (low, high) in enumerate(shaded(figures["effects"].axes[1])):
        np.testing.assert_allclose(low, both["g_effect_low"][i, :, 1], rtol=1e-6)
        np.testing.assert_allclose(high, both["g_effect_high"][i, :, 1], rtol=1e-6)
    expected = widths_by_hand(runs["one"], "deep")
    group = both.sel(group="deep").isel(run=0)
    np.testing.assert_allclose(group.group_effect_high - group.group_effect, expected, rtol=1e-9)
    np.testing.assert_allclose(group.group_effect - group.group_effect_low, expected, rtol=1e-9)
    assert len(shaded(figures["groups"].axes[0])) == 2
    (trade,) = figures["trade_off"].axes
    bars = [b.get_segments()[0] for b in trade.collections if isinstance(b, LineCollection)]
    ends = sorted(float(np.ptp(segment, axis=0).max()) for segment in bars)
    assert ends == pytest.approx([2 * Z * 0.1 * 3**0.5] * 4)


def test_a_sweep_is_shaded_and_its_front_has_bars(swept):
    def of(n):
        made = with_intervals(swept([f"wga(alpha=1:{n}:{n})"], resolve=("sample",)), narrow=0.2)
        return made.assign(pareto=gf.pareto_front(made))

    dataset = of(5)
    panels = sweep_figure(dataset).axes
    for m, panel in enumerate(panels[:2]):
        (band,) = shaded(panel)
        for side, found in zip(("low", "high"), band, strict=True):
            np.testing.assert_allclose(found, dataset[f"g_effect_{side}"][:, m], rtol=1e-6)
    (band,) = shaded(panels[2])
    np.testing.assert_allclose(band[1], dataset["collateral_high"].clip(-10, 10), rtol=1e-6)

    def bars(dataset):
        of = [
            c for c in pareto_figure(dataset).axes[0].collections if isinstance(c, LineCollection)
        ]
        return [np.array(each.get_segments()) for each in of]

    across, up = bars(dataset)
    np.testing.assert_allclose(np.sort(across[..., 0]), np.stack(
        [dataset.g_effect_low[:, 0], dataset.g_effect_high[:, 0]], -1), rtol=1e-9)  # fmt: skip
    np.testing.assert_allclose(up[:, 1, 1], dataset.g_effect_high[:, 1], rtol=1e-9)
    many = of(BARS + 6)
    assert len(bars(many)[0]) <= BARS  # of many objectives, those of the front


def test_maps_say_which_parts_are_within_noise():
    values, half_widths = np.array([[-3.0, 1.0, 0.0]]), np.array([[1.0, 2.0, 1.0]])
    (row,) = HeatMap.of("", "unlearn", ["a", "b", "c"], ["ga"], values, half_widths).rows
    assert [cell[1] for cell in row[2]] == ["-9", "(+3)", "·"]
    assert [cell[0] > 0 for cell in row[2]] == [True, False, False] and row[2][1][0] == 0
    assert row[2][1][2] == "+1.000e+00 [-1.000e+00, +3.000e+00]"
    (plain,) = HeatMap.of("", "unlearn", ["a", "b", "c"], ["ga"], values).rows
    assert [cell[1] for cell in plain[2]] == ["-9", "+3!", "·"]
    dataset = with_intervals(make_dataset(["ga"]))
    half_widths = place_half_widths(dataset, blocks=False)
    assert half_widths.shape == (1, 2, 6) and (half_widths > 0).all()
    assert place_half_widths(make_dataset(["ga"]), blocks=False) is None


def test_maps_have_a_dot_on_every_cell_within_noise():
    dataset = with_intervals(make_dataset(["ga", "gd"]), narrow=0.2)
    values = by_place(dataset, True)[1][:, 1]
    half_widths = place_half_widths(dataset, True)[:, 1]
    panel = blank_figure(3, 3).subplots()
    mark_noise(panel, np.arange(values.shape[1]), values, half_widths)
    (dots,) = panel.get_lines()
    found = sorted(zip(dots.get_ydata(), dots.get_xdata(), strict=True))
    inside = [(k, p) for k, p in np.ndindex(values.shape) if abs(values[k, p]) <= half_widths[k, p]]
    assert found == inside and 0 < len(inside) < values.size


def test_weights_have_the_intervals_of_their_rows():
    """The optimum's rows are drawn anew, with its weights as they are."""
    model = build("llama", dtype=torch.float64)
    forget, retain = samples([9, 7, 11, 8], 1), samples([8, 10, 9], 2)
    result = gf.profile(
        model, None, forget=forget, retain=retain, objectives=["ga"], resolve=("sample", "token")
    )
    best = gf.optimal_weights(result, retain_budget=0.0)
    for effect, risk in (("e_u", "unlearn"), ("e_r", "retain")):
        ga = result.sel(objective="ga", risk=risk)
        assert float(best[f"ga_{effect}_low"]) == pytest.approx(float(ga.g_effect_low))
        assert float(best[f"ga_{effect}_high"]) == pytest.approx(float(ga.g_effect_high))
    rows = (best["weight"] * best["token_e_u"]).sum("token").values
    rng = np.random.default_rng(1)
    counts = 1 + (rng.multinomial(4, [0.25] * 4, size=4000) - 1) * stretch(4)
    drawn = counts @ rows
    drawn = np.quantile(drawn * np.abs(drawn) / abs(rows.sum()), [0.025, 0.975])
    found = [float(best[f"e_u_{side}"]) for side in ("low", "high")]
    np.testing.assert_allclose(found, drawn, atol=0.12 * np.ptp(drawn))
    assert f"[{found[0]:+.3g}, {found[1]:+.3g}]" in text_of(render_weights(best))


def test_the_frontier_has_a_bar_an_objective():
    model = build("llama", dtype=torch.float64)
    forget, retain = samples([9, 7, 11, 8], 1), samples([8, 10, 9], 2)
    result = gf.profile(
        model, None, forget=forget, retain=retain, objectives=["ga", "wga(alpha=1)"],
        resolve=("sample", "token"),
    )  # fmt: skip
    (panel,) = frontier_figure(result, gf.optimal_weights(result, retain_budget=0.0)).axes
    bars = [b for b in panel.collections if isinstance(b, LineCollection)]
    up = np.array(bars[1].get_segments())[:, :, 1]
    low, high = (result[f"g_effect_{side}"].sel(risk="retain").values for side in ("low", "high"))
    np.testing.assert_allclose(np.sort(up[0]), [low[0], high[0]], rtol=1e-9)
    assert "Bars: 95 %" in panel.get_title(loc="left")

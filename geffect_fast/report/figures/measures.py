"""Figures of measures: numbers on sets with their bounds, by model or step, and retention."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.figures.curves import MARKED, draw_lines, over, shade
from geffect_fast.report.figures.predictors import FIGURE, predictor_figure
from geffect_fast.report.format import shortened
from geffect_fast.report.summary.measures import (
    is_control,
    is_relearning,
    measured_metrics,
    measured_sets,
    place_axis,
)
from geffect_fast.report.summary.predictors import is_against_effects
from geffect_fast.report.summary.survey import is_survey, relearning_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure

_MARKERS = "osD^vP*X"
_BOUNDS = ("value_low", "value_high")


def measure_figures(dataset: xr.Dataset) -> dict[str, PlainFigure]:
    """All figures of measures by file stem.

    These are `retention` of a control, `against_effects` of measures that are set against effects,
    `measures`, and `relearned` of the survey's assessment. `figure.get_label()` describes each in a
    sentence. The figures belong to no window and no global state.

    Args:
        dataset: result of `geffect_fast.evaluate`, `against_effects`, `control` or `relearn`.
    """
    return style.drawn(measure_drawings(dataset))


def measure_drawings(dataset: xr.Dataset) -> style.Drawings:
    """Functions that draw the figures of `measure_figures`, one each."""
    drawings: style.Drawings = {}
    if is_control(dataset):
        drawings["retention"] = lambda: _retention(dataset)
    if is_against_effects(dataset):
        drawings[FIGURE] = lambda: predictor_figure(dataset)
    drawings["measures"] = lambda: measures_figure(dataset)
    if is_survey(dataset):
        drawings["relearned"] = lambda: _over_steps_by_model(relearning_of(dataset))
    return drawings


def measures_figure(dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of the numbers of all metrics and sets; None where there are no numbers."""
    if not measured_metrics(dataset):
        return None
    if is_relearning(dataset):
        return _over_steps_by_model(dataset)
    return _over_steps(dataset) if place_axis(dataset) == "step" else _side_by_side(dataset)


# ---- over steps ----


def _over_steps(dataset: xr.Dataset) -> PlainFigure:
    """Figure with a panel a metric and a line a set."""
    metrics, steps = measured_metrics(dataset), dataset["step"].values
    figure, panels = style.panels_for(len(metrics))
    sets = measured_sets(dataset)
    for panel, metric in zip(panels, metrics, strict=True):
        of = dataset.sel(metric=metric, set=sets)
        _lines(panel, steps, of, "set", metric)
    _shaded(figure, dataset)
    _legend(figure, sets)
    figure.set_label(f"{', '.join(metrics)} {over(steps)}, a line a data set.")
    return figure


def _over_steps_by_model(dataset: xr.Dataset) -> PlainFigure:
    """Figure with a panel a metric and set, and a line a model."""
    steps, models = dataset["step"].values, dataset["model"].values.tolist()
    pairs = [
        (metric, name)
        for metric in measured_metrics(dataset)
        for name in measured_sets(dataset)
        if bool(dataset["value"].sel(metric=metric, set=name).notnull().any())
    ]
    figure, panels = style.panels_for(len(pairs))
    for panel, (metric, name) in zip(panels, pairs, strict=True):
        of = dataset.sel(metric=metric, set=name)
        _lines(panel, steps, of, "model", f"{metric}: {name}", "update")
    _shaded(figure, dataset)
    _legend(figure, models)
    shown = ", ".join(dict.fromkeys(metric for metric, _ in pairs))
    figure.set_label(f"{shown} {over(steps)}, a line a model: {', '.join(models)}.")
    return figure


def _lines(
    panel: Axes,
    steps: np.ndarray,
    of: xr.Dataset,
    axis: str,
    title: str,
    across: str = "update step",
) -> None:
    """Draw a line for each place on an axis, in the style of the place.

    A place without any number has no line.
    """
    of = of.transpose("step", axis, ...)
    values = of["value"].values
    there = [i for i in range(values.shape[1]) if not np.isnan(values[:, i]).all()]
    names = [str(name) for name in of[axis].values]
    draw_lines(
        panel,
        steps,
        {names[i]: values[:, i] for i in there},
        title=_wrapped(title),
        words=str(of["statistic"].item()),
        across=across,
        positive=bool((values[:, there] >= 0).all()),
        styles=[style.style_of(i) for i in there],
        bounds=np.stack([of[bound].values[:, there] for bound in _BOUNDS]),
    )


# ---- side by side ----


def _side_by_side(dataset: xr.Dataset) -> PlainFigure:
    """Figure with a panel a metric: the number of each set and model, with a bar for its bounds."""
    from matplotlib.ticker import MaxNLocator

    metrics, sets = measured_metrics(dataset), measured_sets(dataset)
    models = dataset["model"].values.tolist() if place_axis(dataset) else [""]
    if "model" not in dataset["value"].dims:
        dataset = dataset.expand_dims(model=models)
    original = ["original"] if is_control(dataset) else []
    names = [*original, *models]
    figure, panels = style.panels_for(
        len(metrics), height=max(2.0, 0.9 + 0.26 * len(sets) * (len(names) + 0.6))
    )
    step = len(names) + 0.8
    for panel, metric in zip(panels, metrics, strict=True):
        of = dataset.sel(metric=metric, set=sets)
        there = measured_sets(dataset.sel(metric=[metric]))
        top = {name: place * step for place, name in enumerate(there)}
        for i, name in enumerate(names):
            at = [top[each] + i for each in top]
            is_original = bool(original) and i == 0
            if is_original:
                value = of["original_value"].sel(set=[*top]).values
                bounds = np.full((2, len(top)), np.nan)
            else:
                own = of.sel(model=name, set=[*top])
                value, bounds = own["value"].values, np.stack([own[b].values for b in _BOUNDS])
            # without the original, so that a method has the same colour as in `retention`
            colour = style.GREY if is_original else style.style_of(i - len(original))["color"]
            marker = _MARKERS[i % len(_MARKERS)]
            panel.hlines(at, *bounds, color=colour, linewidth=1.8, zorder=2)
            panel.plot(value, at, marker, color=colour, markersize=5, label=name, zorder=3)
        middle = (len(names) - 1) / 2
        panel.set_yticks(
            [place + middle for place in top.values()], [shortened(n, 18) for n in top]
        )
        panel.set_ylim((len(top) - 1) * step + len(names) - 0.3, -0.7)
        panel.set_xlabel(str(of["statistic"].item()), fontsize=9)
        style.set_titles(panel, _wrapped(metric), [])
        panel.margins(x=0.08)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
        style.dress(panel)
        panel.grid(visible=False, axis="y")
    if bool(dataset["value_low"].notnull().any()):
        style.note(figure, style.BARS_NOTE)
    if names != [""]:
        style.legend_below(figure, panels[0])
    marked = f", a mark a model: {', '.join(map(str, names))}" if names != [""] else ""
    figure.set_label(f"{', '.join(metrics)} by data set{marked}.")
    return figure


# ---- retention ----


def _retention(dataset: xr.Dataset) -> PlainFigure:
    """Figure of what is kept along the share of each method.

    It also shows how much must be kept, and the largest share that was found to keep it.
    """
    asked = json.loads(dataset.attrs["control"])
    methods = dataset["model"].values.tolist()
    figure, (panel,) = style.panels_for(1, width=6.2)
    for i, method in enumerate(methods):
        of = dataset.sel(model=method)
        of = of.sel(alpha=of["retention"].notnull())
        look, alphas, kept = style.style_of(i), of["alpha"].values, of["retention"].values
        marker = "o" if len(alphas) <= MARKED else None
        panel.plot(
            alphas, kept, label=method, marker=marker, markersize=3, linewidth=1.6, zorder=3, **look
        )
        shade(
            panel,
            alphas,
            np.stack([of["retention_low"].values, of["retention_high"].values]),
            look["color"],
        )
        chosen = float(of["alpha_chosen"])
        at = float(of["retention"].sel(alpha=chosen))
        panel.plot(chosen, at, "D", color=look["color"], markersize=8, zorder=4)
    least = asked["tau"] * float(dataset["retention"].sel(alpha=0.0).isel(model=0))
    panel.axhline(
        least,
        color=style.GREY,
        linestyle=":",
        linewidth=1.4,
        zorder=1,
        label=f"{asked['tau']:.0%} of the original's",
    )
    panel.set_xlabel("share of the unlearned model", fontsize=9)
    panel.set_ylabel(f"{asked['metric']} ({asked.get('set', 'retain')})", fontsize=9)
    panel.set_xlim(-0.02, 1.02)
    style.set_titles(panel, "What is kept along the share", [])
    style.dress(panel)
    if bool(dataset["retention_low"].notnull().any()):
        style.note(figure, style.SHADED_NOTE)
    style.note(figure, "Diamonds: the largest share that keeps enough.")
    style.legend_below(figure, panel)
    figure.set_label(
        f"{asked['metric']} ({asked.get('set', 'retain')}) along the share of each unlearned model."
    )
    return figure


# ---- notes and legends ----


def _wrapped(title: str) -> str:
    return "\n".join(textwrap.wrap(title, 44))


def _shaded(figure: PlainFigure, dataset: xr.Dataset) -> None:
    if bool(dataset["value_low"].notnull().any()):
        style.note(figure, style.SHADED_NOTE)


def _legend(figure: PlainFigure, names: Sequence[str]) -> None:
    """Name all lines below the figure, as not every panel has each of them."""
    from matplotlib.lines import Line2D

    figure.legend(
        [
            Line2D([], [], marker="o", markersize=3.5, **style.style_of(i))
            for i in range(len(names))
        ],
        list(names),
        loc="outside lower center",
        ncols=min(4, len(names)),
        fontsize=9,
        frameon=False,
        handlelength=3.2,
    )

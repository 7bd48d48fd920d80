"""The figure of first-order predictions of each risk's changes beside the measured changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.figures.curves import draw_lines
from geffect_fast.report.format import number, risk_words
from geffect_fast.report.summary.effects import labels
from geffect_fast.report.summary.step_findings import trust_sentences
from geffect_fast.report.summary.steps import PREDICTIONS, agreements
from geffect_fast.results.told_apart import half_width, risk_spreads

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.report.figures.canvas import PlainFigure

PANEL = 4.6
DRAWN: dict[str, tuple[Any, str]] = {
    "predicted_update": ("--", "o"),
    "predicted_step": ("-.", "s"),
    "predicted_second": ((0, (5, 1, 1, 1, 1, 1)), "D"),
    "predicted_sgd": (":", "^"),
}
"""Dashes and marker of each prediction."""


def prediction_figure(dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of changes: over steps, measured and predicted, and below one against the other.

    The title of each upper panel says how far to trust the first prediction that the result holds,
    which is the one by the actual update where there is one.

    Args:
        dataset: a step result.

    Returns:
        The figure; None where nothing was predicted, as with a single step.
    """
    found = agreements(dataset)
    if not found:
        return None
    risks = labels(dataset, "risk")
    n = len(risks)
    figure = style.blank_figure(0.6 + PANEL * n, 7.6)
    upper, lower = figure.subplots(2, n, squeeze=False)
    measured = dataset["measured_change"].transpose("step", "risk").values
    predicted = {name: dataset[name].transpose("step", "risk").values for name in found}
    styles: list[dict[str, Any]] = [{"color": style.COLOURS[0], "linestyle": "-"}]
    colours = dict(zip(PREDICTIONS, style.COLOURS[1:], strict=False))
    styles += [{"color": colours[name], "linestyle": DRAWN[name][0]} for name in found]
    spreads = risk_spreads(dataset)
    if spreads.shape[-1]:
        style.note(figure, style.SHADED_NOTE)
        half_widths = half_width(spreads - np.roll(spreads, 1, axis=0))
    for m, risk in enumerate(risks):
        bounds = None
        if spreads.shape[-1]:
            bounds = (measured[:, m] + np.outer([-1, 1], half_widths[:, m]))[..., None]
        lines = {"measured": measured[:, m]}
        lines |= {f"predicted {PREDICTIONS[name]}": predicted[name][:, m] for name in found}
        trust = next(iter(found.values()))[risk].words
        title = f"change of the {risk_words(risk)}\nfirst order: {trust}"
        draw_lines(
            upper[m], dataset["step"].values, lines, title=title, words="since the step before",
            absent=1, styles=styles, bounds=bounds,
        )  # fmt: skip
        panel = lower[m]
        both = [measured[:, m], *(predicted[name][:, m] for name in found)]
        said = [
            style.fit_scale(set_scale, both) for set_scale in (panel.set_xscale, panel.set_yscale)
        ]
        if not said[0]:
            panel.locator_params(axis="x", nbins=5)
        for name, by_risk in found.items():
            panel.scatter(
                predicted[name][:, m],
                measured[:, m],
                s=16,
                color=colours[name],
                marker=DRAWN[name][1],
                alpha=0.65,
                linewidths=0,
                label=f"{PREDICTIONS[name]}: r = {number(by_risk[risk].correlation, '.3f')}",
                zorder=3,
            )
        reach = np.concatenate([v[np.isfinite(v)] for v in both] or [np.zeros(1)])
        ends = (min(reach.min(initial=0.0), 0.0), max(reach.max(initial=0.0), 0.0))
        panel.plot(ends, ends, color=style.GREY, linewidth=0.9, zorder=1)
        style.zero_lines(panel, color="#bbbbbb", zorder=0)
        panel.set_xlabel(f"predicted {said[0]}".strip(), fontsize=9)
        panel.set_ylabel("measured  (grey line: equal)", fontsize=9)
        style.dress(panel)
        panel.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, frameon=False, borderpad=0
        )
    style.legend_below(figure, upper[0])
    figure.set_label(" ".join(trust_sentences(dataset)))
    return figure

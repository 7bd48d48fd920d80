"""Figures of several runs side by side: effects, risks, parts of the model, cost of removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.figures.curves import (
    PARTS_NOTE,
    cosine_words,
    draw_lines,
    effect_words,
    lines_by_risk,
    over,
)
from geffect_fast.report.format import number, risk_words, shortened
from geffect_fast.report.summary.effects import bounds_of, labels
from geffect_fast.results.groups import GROUPS, THIRDS
from geffect_fast.results.risks import UNLEARN, effect_name
from geffect_fast.results.told_apart import half_width, risk_spreads

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.report.figures.canvas import PlainFigure


def comparison_figures(runs: xr.Dataset) -> dict[str, PlainFigure]:
    """All figures of a comparison by file stem, in the order in which a reader wants them.

    These are `effects`, `groups`, `risks`, `trade_off` and `cosines`. A figure whose numbers not
    all runs hold is left out. `figure.get_label()` describes each in a sentence.

    Args:
        runs: result of `geffect_fast.compare`.
    """
    return style.drawn(comparison_drawings(runs))


def comparison_drawings(runs: xr.Dataset) -> style.Drawings:
    """Functions that draw the figures of `comparison_figures`, one each."""
    return {
        "effects": lambda: _by_risk(runs, "g_effect", "G-effects by run; e_u"),
        "groups": lambda: _groups(runs),
        "risks": lambda: _risks(runs),
        "trade_off": lambda: _trade_off(runs),
        "cosines": lambda: _cosines(runs),
    }


def _by_risk(runs: xr.Dataset, name: str, about: str, **more: Any) -> PlainFigure:
    """Figure with a panel a risk and a line a run.

    Its description says what every run's last value for the forget risk is.
    """
    risks, names, steps = labels(runs, "risk"), labels(runs, "run"), runs["step"].values
    values, bounds = runs[name].transpose("step", "run", "risk").values, bounds_of(runs, name)
    bounds = None if bounds is None else bounds.swapaxes(1, 2)
    figure = lines_by_risk(steps, risks, names, values, bounds, **more)
    last = zip(names, values[-1, :, risks.index(UNLEARN)], strict=True)
    ends = ", ".join(f"{run} {number(float(value), '.3g')}" for run, value in last)
    figure.set_label(f"{about} {over(steps)}; at the end {ends}.")
    return figure


def _risks(runs: xr.Dataset) -> PlainFigure:
    def words(risk: str) -> tuple[str, str]:
        wanted = "higher: more is removed" if risk == UNLEARN else "higher: more harm"
        return risk_words(risk), f"{runs.attrs['risk']}  ({wanted})"

    about = "Risks by run; the forget risk"
    return _by_risk(runs, "risk_value", about, words=words, positive=True)


def _cosines(runs: xr.Dataset) -> PlainFigure | None:
    if "cosine" not in runs:
        return None
    about = "Cosines by run; with the forget risk"
    return _by_risk(runs, "cosine", about, words=cosine_words, limits=(-1.05, 1.05))


def _groups(runs: xr.Dataset) -> PlainFigure | None:
    """Figure of effects by group of blocks: a row a risk with one scale, a column a group."""
    if "group_effect" not in runs:
        return None
    present = labels(runs, "group")
    blocks = [group for group in present if group in THIRDS or group not in GROUPS]
    if not blocks:
        return None
    risks, names = labels(runs, "risk"), labels(runs, "run")
    effects = runs["group_effect"].transpose("run", "step", "risk", "group").values
    bounds = bounds_of(runs, "group_effect")
    figure = style.blank_figure(0.6 + 3.4 * len(blocks), 0.7 + 2.9 * len(risks))
    grid = figure.subplots(len(risks), len(blocks), squeeze=False, sharey="row", sharex=True)
    for m, (row, risk) in enumerate(zip(grid, risks, strict=True)):
        shown = [present.index(group) for group in blocks]
        for g, panel, group in zip(shown, row, blocks, strict=True):
            draw_lines(
                panel,
                runs["step"].values,
                dict(zip(names, effects[..., m, g], strict=True)),
                title=f"{effect_name(risk)}, {group.replace('_', ' ')} blocks",
                words=effect_words(risk)[1] if group == blocks[0] else "",
                bounds=None if bounds is None else bounds[..., m, g].swapaxes(1, 2),
                across="update step" if risk == risks[-1] else "",
                scaled=[effects[..., m, shown].ravel()],
            )
    if bounds is not None:
        style.note(figure, PARTS_NOTE)
    style.legend_below(figure, grid[0, 0])
    figure.set_label(
        f"G-effects by run in the {', '.join(blocks)} blocks, a row a risk ({', '.join(risks)}), "
        "one scale a row."
    )
    return figure


def _trade_off(runs: xr.Dataset) -> PlainFigure | None:
    """Figure of every other risk's rise against the forget risk's rise, a path a run."""
    risks, names = labels(runs, "risk"), labels(runs, "run")
    others = [risk for risk in risks if risk != UNLEARN]
    if not others:
        return None
    values = runs["risk_value"].transpose("risk", "run", "step").values
    with np.errstate(invalid="ignore"):  # infinity less infinity
        rises = dict(zip(risks, values - values[..., :1], strict=True))
    removed, half_widths = rises[UNLEARN], _rise_half_widths(runs)
    figure, panels = style.panels_for(len(others), width=6.2, height=4.4)
    for panel, risk in zip(panels, others, strict=True):
        across = style.fit_scale(panel.set_xscale, [*removed])
        up = style.fit_scale(panel.set_yscale, [*rises[risk]])
        broken = []
        for i, (name, x, y) in enumerate(zip(names, removed, rises[risk], strict=True)):
            look, finite = style.style_of(i), np.isfinite(x) & np.isfinite(y)
            panel.plot(x[finite], y[finite], linewidth=1.6, label=name, zorder=3, **look)
            if finite.any():
                last = int(np.flatnonzero(finite)[-1])
                off = (
                    (None, None)
                    if half_widths is None
                    else [half_widths[i, last, risks.index(each)] for each in (UNLEARN, risk)]
                )
                panel.errorbar(
                    x[last], y[last], yerr=off[1], xerr=off[0], fmt="o", color=look["color"],
                    zorder=4, elinewidth=1.2, capsize=2,
                )  # fmt: skip
            if not finite.all():
                broken.append(f"{shortened(name, 28)} at {(~finite).sum()} steps")
        style.zero_lines(panel, linewidth=0.9, zorder=1)
        panel.set_xlabel(f"rise of the forget risk: removed (right)\n{across}", fontsize=9)
        panel.set_ylabel(f"rise of the {risk_words(risk)}: harm (up)\n{up}", fontsize=9)
        style.dress(panel)
        style.set_titles(
            panel, f"what removal costs the {risk} set (dot: last finite step)", broken
        )
    if half_widths is not None:
        style.note(figure, style.BARS_NOTE)
    style.legend_below(figure, panels[0])
    ends = (
        f"{name} ends at a rise of {number(float(x[-1]), '.3g')} for {number(float(y[-1]), '.3g')}"
        for name, x, y in zip(names, removed, rises[others[0]], strict=True)
    )
    figure.set_label(
        f"Rise of {', '.join(map(risk_words, others))} against the rise of the forget risk, a path "
        f"a run; {', '.join(ends)}."
    )
    return figure


def _rise_half_widths(runs: xr.Dataset) -> np.ndarray | None:
    """Half widths of the intervals of rises since the first step, `(run, step, risk)`."""
    if "risk_value_spread" not in runs:
        return None
    spreads = [risk_spreads(runs.isel(run=i)) for i in range(runs.sizes["run"])]
    return np.stack([half_width(of - of[:1]) for of in spreads])

"""Figures of several runs side by side: effects, risks, parts of the model, what removal costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures.profile import blank_figure
from geffect_fast.report.figures.steps import PARTS_NOTE, effect_words, panels_for
from geffect_fast.report.figures.style import (
    BARS_NOTE,
    GREY,
    SHADED_NOTE,
    draw_lines,
    dress,
    fit_scale,
    legend_below,
    note,
    set_titles,
    shortened,
    style_of,
)
from geffect_fast.report.files import Drawings, drawn_parts, write_parts
from geffect_fast.report.summary.objectives import UNLEARN
from geffect_fast.report.summary.steps import bounds_of, risk_words
from geffect_fast.report.tables.profile import number, symbol
from geffect_fast.results.axes import GROUPS, THIRDS
from geffect_fast.results.told_apart import half_width, risk_spreads
from geffect_fast.steps.compare import compare

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


def compare_figures(datasets: Mapping[str, xr.Dataset]) -> dict[str, Figure]:
    """`comparison_figures` of step results by name.

    Raises:
        InputError: as `geffect_fast.compare`.
    """
    return comparison_figures(compare(datasets))


def comparison_figures(runs: xr.Dataset) -> dict[str, Figure]:
    """All figures of a comparison by file stem, in the order in which a reader wants them.

    `effects`, `groups`, `risks`, `trade_off`, `cosines`; one whose numbers not all runs hold is
    left out. `figure.get_label()` describes each in a sentence.

    Args:
        runs: of `geffect_fast.compare`.
    """
    drawn = {name: draw() for name, draw in comparison_drawings(runs).items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def comparison_drawings(runs: xr.Dataset) -> Drawings:
    """How the figures of `comparison_figures` are made, one by one."""
    return {
        "effects": lambda: _effects(runs),
        "groups": lambda: _groups(runs),
        "risks": lambda: _risks(runs),
        "trade_off": lambda: _trade_off(runs),
        "cosines": lambda: _cosines(runs),
    }


def draw_comparison(runs: xr.Dataset, folder: Path) -> None:
    """Write the figures of a comparison into `plots/` in a folder.

    Raises:
        UnfinishedError: some could not be drawn; the others are there.
    """
    write_parts(drawn_parts(comparison_drawings(runs)), folder)


def _lines(values: xr.DataArray) -> dict[str, np.ndarray]:
    return {
        str(name): line
        for name, line in zip(
            values["run"].values, values.transpose("run", "step").values, strict=True
        )
    }


def _bands(runs: xr.Dataset, name: str, m: int) -> dict[str, np.ndarray] | None:
    """Bounds of the runs' intervals on the `m`-th risk, `(2, S)` by run; None: not known."""
    found = bounds_of(runs, name)
    if found is None:
        return None
    return {run: found[:, i, :, m] for i, run in enumerate(map(str, runs["run"].values))}


def _about(runs: xr.Dataset, what: str, values: xr.DataArray) -> str:
    """A sentence: what is drawn, and where every run ends."""
    steps = runs["step"].values
    ends = ", ".join(
        f"{name} {number(float(line[-1]), '.3g')}" for name, line in _lines(values).items()
    )
    return f"{what} over {len(steps)} steps from {steps[0]} to {steps[-1]}; at the end {ends}."


def _effects(runs: xr.Dataset) -> Figure:
    risks = [str(risk) for risk in runs["risk"].values]
    figure, panels = panels_for(len(risks))
    for m, (panel, risk) in enumerate(zip(panels, risks, strict=True)):
        title, words = effect_words(risk)
        lines, bands = _lines(runs["g_effect"].sel(risk=risk)), _bands(runs, "g_effect", m)
        draw_lines(panel, runs["step"].values, lines, title=title, words=words, bands=bands)
    _say_shaded(figure, runs, "g_effect")
    legend_below(figure, panels[0])
    figure.set_label(_about(runs, "G-effects by run; e_u", runs["g_effect"].sel(risk=UNLEARN)))
    return figure


def _say_shaded(figure: Figure, runs: xr.Dataset, name: str) -> None:
    if f"{name}_low" in runs:
        note(figure, SHADED_NOTE)


def _groups(runs: xr.Dataset) -> Figure | None:
    """A row a risk, a column a group of blocks, one scale a row."""
    if "group_effect" not in runs:
        return None
    present = [str(group) for group in runs["group"].values]
    blocks = [group for group in present if group in THIRDS or group not in GROUPS]
    if not blocks:
        return None
    known = "group_effect_low" in runs
    risks = [str(risk) for risk in runs["risk"].values]
    figure = blank_figure(0.6 + 3.4 * len(blocks), 0.7 + 2.9 * len(risks))
    grid = figure.subplots(len(risks), len(blocks), squeeze=False, sharey="row", sharex=True)
    for row, risk in zip(grid, risks, strict=True):
        effect = runs["group_effect"].sel(risk=risk)
        whole = [line for group in blocks for line in _lines(effect.sel(group=group)).values()]
        for panel, group in zip(row, blocks, strict=True):
            lines, bands = _lines(effect.sel(group=group)), None
            if known:
                sides = (runs[f"group_effect_{side}"] for side in ("low", "high"))
                low, high = (_lines(side.sel(risk=risk, group=group)) for side in sides)
                bands = {name: np.stack([low[name], high[name]]) for name in lines}
            title = f"e_{symbol(risk)}, {group.replace('_', ' ')} blocks"
            words = effect_words(risk)[1] if group == blocks[0] else ""
            draw_lines(
                panel, runs["step"].values, lines, title=title, words=words, bands=bands,
                across="update step" if risk == risks[-1] else "", scaled=whole,
            )  # fmt: skip
    if known:
        note(figure, PARTS_NOTE)
    legend_below(figure, grid[0, 0])
    parts = ", ".join(blocks)
    figure.set_label(
        f"G-effects by run in the {parts} blocks, a row a risk ({', '.join(risks)}), one scale a "
        "row."
    )
    return figure


def _risks(runs: xr.Dataset) -> Figure:
    risks = [str(risk) for risk in runs["risk"].values]
    figure, panels = panels_for(len(risks))
    for m, (panel, risk) in enumerate(zip(panels, risks, strict=True)):
        values = runs["risk_value"].sel(risk=risk)
        wanted = "higher: more is removed" if risk == UNLEARN else "higher: more harm"
        draw_lines(
            panel, runs["step"].values, _lines(values), title=risk_words(risk),
            words=f"{runs.attrs['risk']}  ({wanted})", positive=bool((values > 0).all()),
            bands=_bands(runs, "risk_value", m),
        )  # fmt: skip
    _say_shaded(figure, runs, "risk_value")
    legend_below(figure, panels[0])
    figure.set_label(
        _about(runs, "Risks by run; the forget risk", runs["risk_value"].sel(risk=UNLEARN))
    )
    return figure


def _trade_off(runs: xr.Dataset) -> Figure | None:
    """Rise of every other risk against the rise of the forget risk, a path a run."""
    others = [str(risk) for risk in runs["risk"].values if risk != UNLEARN]
    if not others:
        return None
    with np.errstate(invalid="ignore"):  # infinity less infinity
        rise = runs["risk_value"] - runs["risk_value"].isel(step=0)
    removed = _lines(rise.sel(risk=UNLEARN))
    widths = _rise_widths(runs)
    figure, panels = panels_for(len(others), width=6.2, height=4.4)
    names = [str(risk) for risk in runs["risk"].values]
    unlearn = names.index(UNLEARN)
    for panel, risk in zip(panels, others, strict=True):
        m = names.index(risk)
        harm = _lines(rise.sel(risk=risk))
        across = fit_scale(panel.set_xscale, list(removed.values()))
        up = fit_scale(panel.set_yscale, list(harm.values()))
        broken = []
        for i, (name, x) in enumerate(removed.items()):
            y, style = harm[name], style_of(i)
            finite = np.isfinite(x) & np.isfinite(y)
            panel.plot(x[finite], y[finite], linewidth=1.6, label=name, zorder=3, **style)
            if finite.any():
                last = int(np.flatnonzero(finite)[-1])
                off = (None, None) if widths is None else widths[i][last, [unlearn, m]]
                panel.errorbar(
                    x[last], y[last], yerr=off[1], xerr=off[0], fmt="o", color=style["color"],
                    zorder=4, elinewidth=1.2, capsize=2,
                )  # fmt: skip
            if not finite.all():
                broken.append(f"{shortened(name, 28)} at {(~finite).sum()} steps")
        panel.axhline(0, color=GREY, linewidth=0.9, zorder=1)
        panel.axvline(0, color=GREY, linewidth=0.9, zorder=1)
        panel.set_xlabel(f"rise of the forget risk: removed (right)\n{across}", fontsize=9)
        panel.set_ylabel(f"rise of the {risk_words(risk)}: harm (up)\n{up}", fontsize=9)
        dress(panel)
        set_titles(panel, f"what removal costs the {risk} set (dot: last finite step)", broken)
    if widths is not None:
        note(figure, BARS_NOTE)
    legend_below(figure, panels[0])
    figure.set_label(
        f"Rise of {', '.join(map(risk_words, others))} against the rise of the forget risk, a path "
        "a run; "
        + ", ".join(
            f"{name} ends at a rise of {number(float(x[-1]), '.3g')} for "
            f"{number(float(_lines(rise.sel(risk=others[0]))[name][-1]), '.3g')}"
            for name, x in removed.items()
        )
        + "."
    )
    return figure


def _rise_widths(runs: xr.Dataset) -> np.ndarray | None:
    """Half of the intervals of the risks' rises since the first step, `(run, step, risk)`."""
    if "risk_value_spread" not in runs:
        return None
    spreads = [risk_spreads(runs.isel(run=i)) for i in range(runs.sizes["run"])]
    return np.stack([half_width(of - of[:1]) for of in spreads])


def _cosines(runs: xr.Dataset) -> Figure | None:
    if "cosine" not in runs:
        return None
    risks = [str(risk) for risk in runs["risk"].values]
    figure, panels = panels_for(len(risks))
    for panel, risk in zip(panels, risks, strict=True):
        draw_lines(
            panel, runs["step"].values, _lines(runs["cosine"].sel(risk=risk)),
            title=f"with the gradient of the {risk_words(risk)}", words=f"cosine_{symbol(risk)}",
            limits=(-1.05, 1.05),
        )  # fmt: skip
    legend_below(figure, panels[0])
    figure.set_label(
        _about(runs, "Cosines by run; with the forget risk", runs["cosine"].sel(risk=UNLEARN))
    )
    return figure

"""Heat maps of a step result: parts of the model against update steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.figures.profile import NOISE_NOTE, mark_noise, part_ticks
from geffect_fast.report.format import shortened
from geffect_fast.report.summary.effects import by_place, labels, place_half_widths
from geffect_fast.results.risks import UNLEARN, effect_name

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure


def layer_maps(dataset: xr.Dataset, objectives: list[str]) -> PlainFigure | None:
    """Figure with a heat map for each risk and objective, each with a scale of its own.

    None where the result sums over parts of the model.

    Args:
        dataset: a step result.
        objectives: objectives to draw, a row each.
    """
    placed = by_place(dataset, blocks=True)
    if placed is None:
        return None
    parts, values = placed
    half_widths = place_half_widths(dataset, blocks=True)
    steps = dataset["step"].values
    risks, present = labels(dataset, "risk"), labels(dataset, "objective")
    height = min(max(0.2 * len(parts), 2.2), 6.0)
    figure = style.blank_figure(0.8 + 4.9 * len(risks), 0.8 + (height + 0.6) * len(objectives))
    grid = figure.subplots(len(objectives), len(risks), squeeze=False)
    ticks = part_ticks(parts, 20)
    for row, objective in zip(grid, objectives, strict=True):
        k = present.index(objective)
        effect = values[:, k]
        for m, (panel, risk) in enumerate(zip(row, risks, strict=True)):
            title = f"{effect_name(risk)} under {shortened(objective, 34)}"
            _map(figure, panel, steps, effect[:, m].T, risk, title)
            if half_widths is not None:
                mark_noise(panel, steps, effect[:, m].T, half_widths[:, k, m].T)
            panel.set_yticks(list(ticks), list(ticks.values()) if m == 0 else [])
            panel.tick_params(labelsize=8, length=2)
    figure.supxlabel("update step", fontsize=10)
    figure.supylabel("part of the model, input (bottom) to output", fontsize=10)
    left_out = len(present) - len(objectives)
    note = f"each map has its own scale; {style.EFFECTS_NOTE}"
    if half_widths is not None:
        note += f"; {NOISE_NOTE}"
    if left_out:
        note += f"; objectives left out: {left_out}"
    figure.suptitle(note, fontsize=9, color=style.GREY)
    figure.set_label(
        f"Heat maps of G-effects by {len(parts)} parts of the model over {len(steps)} steps from "
        f"{steps[0]} to {steps[-1]}, one a risk ({', '.join(risks)}), under "
        f"{', '.join(objectives)}; {note}."
    )
    return figure


def _map(
    figure: PlainFigure,
    panel: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    risk: str,
    title: str,
) -> None:
    """Draw one heat map `(parts, steps)` of effects on a risk, with a colour bar of its own."""
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.ticker import MaxNLocator

    finite = np.isfinite(values)
    scales: dict[str, Any] = {}
    # the scale follows the decades between steps; parts of small effects may stay pale
    largest = np.abs(np.where(finite, values, 0.0)).max(axis=0)
    said = style.fit_scale(lambda _, **more: scales.update(more), [largest])
    reach = float(np.abs(values[finite]).max(initial=0.0)) or 1.0
    norm: Normalize = Normalize(-reach, reach)
    if said:
        norm = SymLogNorm(scales["linthresh"], vmin=-reach, vmax=reach, linscale=0.6)
    image = panel.pcolormesh(
        edges_of(steps),
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=style.effect_colours(wanted_below=risk == UNLEARN),
        norm=norm,
        rasterized=True,  # vectors of many steps and layers take megabytes
    )
    panel.set_facecolor("#999999")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    lost = int((~finite).sum())
    style.set_titles(panel, title, [f"{lost} cells, grey"] if lost else [])
    figure.colorbar(image, ax=panel, pad=0.02, label=said).ax.tick_params(labelsize=8)


def edges_of(steps: np.ndarray) -> np.ndarray:
    """Boundaries halfway between steps, and as far again beyond the first and the last."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])

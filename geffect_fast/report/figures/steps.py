"""Figures of a step result: effects, risks, layers, token weights, predictions, over steps."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures.layer_maps import layer_maps
from geffect_fast.report.figures.prediction import prediction_figure
from geffect_fast.report.figures.profile import blank_figure
from geffect_fast.report.figures.style import (
    COLOURS,
    SHADED_NOTE,
    draw_lines,
    legend_below,
    note,
    set_titles,
    shortened,
)
from geffect_fast.report.files import Drawings
from geffect_fast.report.summary.objectives import UNLEARN, by_place, place_widths
from geffect_fast.report.summary.steps import (
    Steps,
    outcome_sentence,
    risk_words,
)
from geffect_fast.report.summary.sweep import thinned
from geffect_fast.report.tables.profile import number, symbol

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 4.4
"""Inches that a panel is wide."""
SHOWN = 8
"""Of more objectives than this, some are drawn; the trained one always is."""
MAPPED = 3
"""Of so many objectives layers and token weights are drawn."""
BANDS = ((0.0, 1.0, 0.12), (0.05, 0.95, 0.2), (0.25, 0.75, 0.35))
"""Quantiles between which token weights are shaded, and how darkly."""

PARTS_NOTE = f"{SHADED_NOTE[:-1]} that objectives read."
"""Those of other risks are not told apart by part."""


def step_figures(dataset: xr.Dataset) -> dict[str, Figure]:
    """All figures of a step result by file stem, in the order in which a reader wants them.

    `effects`, `risks`, `groups`, `layers`, `prediction`, `cosines`, `norms`, `token_weights`; one
    whose numbers the result does not hold is left out. `figure.get_label()` describes each in a
    sentence. They belong to no window and no global state.

    Args:
        dataset: with a first axis `step`.
    """
    drawn = {name: draw() for name, draw in step_drawings(dataset).items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def step_drawings(dataset: xr.Dataset) -> Drawings:
    """How the figures of `step_figures` are made, one by one."""
    read = Steps.of(dataset)
    mapped = [read.objectives[k] for k in _shown(read)[:MAPPED]]
    return {
        "effects": lambda: _effects(read),
        "risks": lambda: _risks(read, dataset),
        "groups": lambda: _groups(read, dataset),
        "layers": lambda: layer_maps(dataset, mapped),
        "prediction": lambda: prediction_figure(dataset),
        "cosines": lambda: _cosines(read, dataset),
        "norms": lambda: _norms(read, dataset),
        "token_weights": lambda: _token_weights(read, dataset),
    }


def effect_words(risk: str) -> tuple[str, str]:
    """Title of a panel with the effect on a risk, and the words along its axis."""
    hint = "lower: removes more" if risk == UNLEARN else "below 0: harms"
    return f"effect on the {risk_words(risk)}", f"e_{symbol(risk)}  ({hint})"


def panels_for(n: int, width: float = PANEL, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """A figure with panels side by side, three at most in a row; unused ones are not there."""
    columns = 2 if n == 4 else min(n, 3)
    rows = -(-n // columns)
    figure = blank_figure(0.4 + width * columns, 0.6 + height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in grid[n:]:
        panel.remove()
    return figure, grid[:n]


def _shown(read: Steps) -> list[int]:
    """Places of the objectives that are drawn, the first always."""
    return [int(k) for k in thinned(np.arange(len(read.objectives)), SHOWN)]


def _over(steps: np.ndarray) -> str:
    return f"over {len(steps)} steps from {steps[0]} to {steps[-1]}"


def _ends(values: np.ndarray) -> str:
    return f"from {number(float(values[0]), '.3g')} to {number(float(values[-1]), '.3g')}"


def _effects(read: Steps) -> Figure:
    figure, panels = panels_for(len(read.risks))
    shown = _shown(read)
    for m, (panel, risk) in enumerate(zip(panels, read.risks, strict=True)):
        lines = {read.objectives[k]: read.effects[:, k, m] for k in shown}
        bands = None
        if read.effect_bounds is not None:
            bands = {read.objectives[k]: read.effect_bounds[:, :, k, m] for k in shown}
        title, words = effect_words(risk)
        draw_lines(panel, read.steps, lines, title=title, words=words, bands=bands)
    legend_below(figure, panels[0])
    lead = ", ".join(
        f"e_{symbol(risk)} {_ends(read.effects[:, 0, m])}" for m, risk in enumerate(read.risks)
    )
    left_out = len(read.objectives) - len(shown)
    more = f"; objectives left out: {left_out}" if left_out else ""
    if left_out:
        note(figure, f"objectives left out: {left_out}")
    if read.effect_bounds is not None:
        note(figure, SHADED_NOTE)
    figure.set_label(
        f"G-effects of {', '.join(read.objectives[k] for k in shown)} {_over(read.steps)}: "
        f"{read.objectives[0]} has {lead}{more}."
    )
    return figure


def _risks(read: Steps, dataset: xr.Dataset) -> Figure:
    figure, (panel,) = panels_for(1, width=6.2)
    lines = {risk_words(risk): read.values[:, m] for m, risk in enumerate(read.risks)}
    trained = dataset.attrs.get("trained_objective")
    title = f"Risks while trained on {trained}" if trained else "Risks"
    title = "\n".join(textwrap.wrap(title, 70))
    words = f"risk ({dataset.attrs.get('risk', 'nll')})"
    bands = None
    if read.value_bounds is not None:
        bands = {risk_words(r): read.value_bounds[:, :, m] for m, r in enumerate(read.risks)}
        note(figure, SHADED_NOTE)
    draw_lines(
        panel, read.steps, lines, title=title, words=words,
        positive=bool((read.values > 0).all()), bands=bands,
    )  # fmt: skip
    legend_below(figure, panel)
    figure.set_label(outcome_sentence(dataset))
    return figure


def _groups(read: Steps, dataset: xr.Dataset) -> Figure | None:
    """Effects of the lead objective by part of the model."""
    placed = by_place(dataset, blocks=False)
    if placed is None:
        return None
    labels, values = placed
    at = _place(dataset, read.objectives[0])
    figure, panels = panels_for(len(read.risks))
    figure.suptitle(f"Parts of the model under {shortened(read.objectives[0], 70)}", fontsize=10)
    widths = place_widths(dataset, blocks=False)
    if widths is not None:
        note(figure, PARTS_NOTE)
    for m, (panel, risk) in enumerate(zip(panels, read.risks, strict=True)):
        names = [label.replace("_", " ") for label in labels]
        lines = {name: values[:, at, m, p] for p, name in enumerate(names)}
        bands = None
        if widths is not None:
            bands = {
                name: values[:, at, m, p] + np.outer([-1, 1], widths[:, at, m, p])
                for p, name in enumerate(names)
            }
        title, words = effect_words(risk)
        draw_lines(panel, read.steps, lines, title=title, words=words, bands=bands)
    legend_below(figure, panels[0])
    figure.set_label(
        f"G-effects of {read.objectives[0]} by part of the model ({', '.join(labels)}) "
        f"{_over(read.steps)}, a panel a risk."
    )
    return figure


def _cosines(read: Steps, dataset: xr.Dataset) -> Figure | None:
    if "cosine" not in dataset:
        return None
    cosines = dataset["cosine"].transpose("step", "objective", "risk").values
    figure, panels = panels_for(len(read.risks))
    shown = _shown(read)
    for m, (panel, risk) in enumerate(zip(panels, read.risks, strict=True)):
        lines = {
            objective: cosines[:, _place(dataset, objective), m]
            for objective in (read.objectives[k] for k in shown)
        }
        title = f"with the gradient of the {risk_words(risk)}"
        draw_lines(
            panel, read.steps, lines, title=title, words=f"cosine_{symbol(risk)}",
            limits=(-1.05, 1.05),
        )  # fmt: skip
    legend_below(figure, panels[0])
    lead = cosines[:, _place(dataset, read.objectives[0])]
    ends = ", ".join(f"{risk} {_ends(lead[:, m])}" for m, risk in enumerate(read.risks))
    figure.set_label(
        f"Cosines of objectives' gradients with the risks' {_over(read.steps)}: "
        f"{read.objectives[0]} with {ends}."
    )
    return figure


def _norms(read: Steps, dataset: xr.Dataset) -> Figure | None:
    norms = {
        "objectives": ("grad_norm", "objective", [read.objectives[k] for k in _shown(read)]),
        "risks": ("risk_grad_norm", "risk", read.risks),
    }
    there = {what: norm for what, norm in norms.items() if norm[0] in dataset}
    if not there:
        return None
    figure, panels = panels_for(len(there))
    for panel, (what, (name, axis, labels)) in zip(panels, there.items(), strict=True):
        values = dataset[name].transpose("step", axis)
        lines = {label: values.sel({axis: label}).values for label in labels}
        positive = all((line > 0).all() for line in lines.values())
        title = f"gradients of the {what}"
        draw_lines(panel, read.steps, lines, title=title, words="norm", positive=positive)
        handles, names = panel.get_legend_handles_labels()
        panel.legend(
            handles,
            [shortened(name, 40) for name in names],
            loc="upper left",
            bbox_to_anchor=(0, -0.2),
            fontsize=8,
            frameon=False,
        )
    figure.set_label(f"Norms of the gradients of {' and '.join(there)} {_over(read.steps)}.")
    return figure


def _token_weights(read: Steps, dataset: xr.Dataset) -> Figure | None:
    """Quantiles over tokens of the weights an objective puts on them."""
    if "token_weight" not in dataset:
        return None
    weights = dataset["token_weight"].transpose("step", "objective", "sample", "token")
    of_set = (
        weights["set"].values
        if "set" in weights.coords
        else np.full(weights.sizes["sample"], "forget")
    )
    drawn: list[tuple[str, str, np.ndarray]] = []
    for k in _shown(read):
        objective = weights.sel(objective=read.objectives[k]).values
        for name in dict.fromkeys(map(str, of_set)):
            flat = objective[:, of_set == name].reshape(len(read.steps), -1)
            if not np.isnan(flat).all():
                drawn.append((read.objectives[k], name, flat))
    if not drawn:
        return None
    left_out = max(0, len(drawn) - 2 * MAPPED)
    drawn = drawn[: 2 * MAPPED]
    figure, panels = panels_for(len(drawn))
    for panel, (objective, name, flat) in zip(panels, drawn, strict=True):
        title = f"{shortened(objective, 34)}: {name} rows"
        _bands(panel, read.steps, flat, title)
    about = "weight on a token: d objective / d log-probability; above 0 it is pushed away"
    if left_out:
        about += f"; panels left out: {left_out}"
    note(figure, textwrap.fill(about, int(15 * figure.get_figwidth())))
    legend_below(figure, panels[0])
    figure.set_label(
        f"Quantiles over tokens of the weights that "
        f"{', '.join(dict.fromkeys(objective for objective, *_ in drawn))} put on them "
        f"{_over(read.steps)}."
    )
    return figure


def _bands(panel: Axes, steps: np.ndarray, weights: np.ndarray, title: str) -> None:
    """The median and shaded quantiles of `(steps, tokens)`, NaN where there is no token."""
    # a token that is not there at any step is none; one that is lost on the way is said
    there = ~np.isnan(weights).all(axis=0)
    lost = (~np.isfinite(weights[:, there])).any(axis=1)
    finite = np.where(np.isfinite(weights), weights, np.nan)
    empty = np.isnan(finite).all(axis=1)
    finite[empty] = 0.0
    colour = COLOURS[0]
    for low, high, alpha in BANDS:
        edges = np.nanquantile(finite, [low, high], axis=1)
        edges[:, empty] = np.nan
        name = "all tokens" if low == 0 else f"{low:.0%} to {high:.0%} of tokens"
        panel.fill_between(steps, *edges, color=colour, alpha=alpha, linewidth=0, label=name)
    median = np.nanmedian(finite, axis=1)
    median[empty] = np.nan
    draw_lines(
        panel,
        steps,
        {"median": median},
        title=title,
        words="weight",
        styles=[{"color": colour, "linestyle": "-"}],
    )
    if lost.any():
        set_titles(panel, title, [f"tokens at {lost.sum()} of {len(steps)} steps"])


def _place(dataset: xr.Dataset, objective: str) -> int:
    return [str(o) for o in dataset["objective"].values].index(objective)

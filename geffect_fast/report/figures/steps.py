"""Figures of a step result over steps: effects, risks, layers, token weights, predictions."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures import style
from geffect_fast.report.figures.curves import (
    PARTS_NOTE,
    cosine_words,
    draw_lines,
    lines_by_risk,
    over,
)
from geffect_fast.report.figures.layer_maps import layer_maps
from geffect_fast.report.figures.measures import measures_figure
from geffect_fast.report.figures.prediction import prediction_figure
from geffect_fast.report.format import number, risk_words, shortened
from geffect_fast.report.summary.effects import by_place, labels, place_half_widths, thinned
from geffect_fast.report.summary.measures import live_measures
from geffect_fast.report.summary.step_findings import outcome_sentence
from geffect_fast.report.summary.steps import Steps
from geffect_fast.results.risks import effect_name

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

    from geffect_fast.report.figures.canvas import PlainFigure

SHOWN = 8
"""The most objectives that are drawn. The trained one is always among them."""
MAPPED = 3
"""The most objectives whose layers and token weights are drawn."""
BANDS = ((0.0, 1.0, 0.12), (0.05, 0.95, 0.2), (0.25, 0.75, 0.35))
"""Bands of token weights: the lower and the upper quantile, and the opacity of the shade."""


def step_figures(dataset: xr.Dataset) -> dict[str, PlainFigure]:
    """All figures of a step result by file stem, in the order in which a reader wants them.

    These are `effects`, `risks`, `groups`, `layers`, `prediction`, `cosines`, `norms`,
    `token_weights` and `measures`. A figure whose numbers the result does not hold is left out.
    `figure.get_label()` describes each in a sentence. The figures belong to no window and no global
    state.

    Args:
        dataset: a result with a first axis `step`.
    """
    return style.drawn(step_drawings(dataset))


def step_drawings(dataset: xr.Dataset) -> style.Drawings:
    """Functions that draw the figures of `step_figures`, one each."""
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
        "measures": lambda: _measures(dataset),
    }


def _shown(read: Steps) -> list[int]:
    """Indices of the objectives that are drawn, the first always among them."""
    return thinned(np.arange(len(read.objectives)), SHOWN).tolist()


def _from_to(names: list[str], values: np.ndarray) -> str:
    """Names with the first and the last of their values, `(S, len(names))`."""
    return ", ".join(
        f"{name} from {number(float(v[0]), '.3g')} to {number(float(v[-1]), '.3g')}"
        for name, v in zip(names, values.T, strict=True)
    )


def _effects(read: Steps) -> PlainFigure:
    shown = _shown(read)
    names, of_bounds = [read.objectives[k] for k in shown], read.effect_bounds
    figure = lines_by_risk(
        read.steps,
        read.risks,
        names,
        read.effects[:, shown],
        None if of_bounds is None else of_bounds[:, :, shown],
    )
    left_out = len(read.objectives) - len(shown)
    more = f"objectives left out: {left_out}" if left_out else ""
    if more:
        style.note(figure, more)
    lead = _from_to([*map(effect_name, read.risks)], read.effects[:, 0])
    figure.set_label(
        f"G-effects of {', '.join(names)} {over(read.steps)}: {read.objectives[0]} has {lead}"
        f"{more and f'; {more}'}."
    )
    return figure


def _risks(read: Steps, dataset: xr.Dataset) -> PlainFigure:
    figure, (panel,) = style.panels_for(1, width=6.2)
    names, bounds = [*map(risk_words, read.risks)], read.value_bounds
    trained = dataset.attrs.get("trained_objective")
    title = f"Risks while trained on {trained}" if trained else "Risks"
    if bounds is not None:
        style.note(figure, style.SHADED_NOTE)
    draw_lines(
        panel,
        read.steps,
        dict(zip(names, read.values.T, strict=True)),
        title="\n".join(textwrap.wrap(title, 70)),
        words=f"risk ({dataset.attrs.get('risk', 'nll')})",
        positive=bool((read.values > 0).all()),
        bounds=bounds,
    )
    style.legend_below(figure, panel)
    figure.set_label(outcome_sentence(dataset))
    return figure


def _groups(read: Steps, dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of the effects of the lead objective by part of the model."""
    placed = by_place(dataset, blocks=False)
    if placed is None:
        return None
    parts, values = placed
    at = labels(dataset, "objective").index(read.objectives[0])
    effects, half_widths = values[:, at].swapaxes(1, 2), place_half_widths(dataset, blocks=False)
    bounds = None
    if half_widths is not None:
        off = half_widths[:, at].swapaxes(1, 2)
        bounds = np.stack([effects - off, effects + off])
    names = [part.replace("_", " ") for part in parts]
    title = f"Parts of the model under {shortened(read.objectives[0], 70)}"
    figure = lines_by_risk(
        read.steps, read.risks, names, effects, bounds, above=title, said=PARTS_NOTE
    )
    figure.set_label(
        f"G-effects of {read.objectives[0]} by part of the model ({', '.join(parts)}) "
        f"{over(read.steps)}, a panel a risk."
    )
    return figure


def _cosines(read: Steps, dataset: xr.Dataset) -> PlainFigure | None:
    if "cosine" not in dataset:
        return None
    names = [read.objectives[k] for k in _shown(read)]
    cosines = dataset["cosine"].sel(objective=names).transpose("step", "objective", "risk").values
    figure = lines_by_risk(
        read.steps, read.risks, names, cosines, words=cosine_words, limits=(-1.05, 1.05)
    )
    figure.set_label(
        f"Cosines of objectives' gradients with the risks' {over(read.steps)}: "
        f"{names[0]} with {_from_to(read.risks, cosines[:, 0])}."
    )
    return figure


def _norms(read: Steps, dataset: xr.Dataset) -> PlainFigure | None:
    norms = {
        "objectives": ("grad_norm", "objective", [read.objectives[k] for k in _shown(read)]),
        "risks": ("risk_grad_norm", "risk", read.risks),
    }
    there = {what: norm for what, norm in norms.items() if norm[0] in dataset}
    if not there:
        return None
    figure, panels = style.panels_for(len(there))
    for panel, (what, (name, axis, names)) in zip(panels, there.items(), strict=True):
        lines = {label: dataset[name].sel({axis: label}).values for label in names}
        positive = all((line > 0).all() for line in lines.values())
        title = f"gradients of the {what}"
        draw_lines(panel, read.steps, lines, title=title, words="norm", positive=positive)
        handles, shown = panel.get_legend_handles_labels()
        panel.legend(
            handles,
            [shortened(label, 40) for label in shown],
            loc="upper left",
            bbox_to_anchor=(0, -0.2),
            fontsize=8,
            frameon=False,
        )
    figure.set_label(f"Norms of the gradients of {' and '.join(there)} {over(read.steps)}.")
    return figure


def _measures(dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of the metrics that were measured during the training; None without any."""
    measures = live_measures(dataset)
    return None if measures is None else measures_figure(measures)


def _token_weights(read: Steps, dataset: xr.Dataset) -> PlainFigure | None:
    """Figure of the weights that objectives put on tokens, as quantiles over tokens."""
    if "token_weight" not in dataset:
        return None
    weights = dataset["token_weight"].transpose("step", "objective", "sample", "token")
    of_set = (
        weights["set"].values
        if "set" in weights.coords
        else np.full(weights.sizes["sample"], "forget")
    )
    bands: list[tuple[str, str, np.ndarray]] = []
    for k in _shown(read):
        objective = weights.sel(objective=read.objectives[k]).values
        for name in dict.fromkeys(map(str, of_set)):
            flat = objective[:, of_set == name].reshape(len(read.steps), -1)
            if not np.isnan(flat).all():
                bands.append((read.objectives[k], name, flat))
    if not bands:
        return None
    left_out = max(0, len(bands) - 2 * MAPPED)
    bands = bands[: 2 * MAPPED]
    figure, panels = style.panels_for(len(bands))
    for panel, (objective, name, flat) in zip(panels, bands, strict=True):
        title = f"{shortened(objective, 34)}: {name} rows"
        _bands(panel, read.steps, flat, title)
    about = "weight on a token: d objective / d log-probability; above 0 it is pushed away"
    if left_out:
        about += f"; panels left out: {left_out}"
    style.note(figure, textwrap.fill(about, int(15 * figure.get_figwidth())))
    style.legend_below(figure, panels[0])
    figure.set_label(
        f"Quantiles over tokens of the weights that "
        f"{', '.join(dict.fromkeys(objective for objective, *_ in bands))} put on them "
        f"{over(read.steps)}."
    )
    return figure


def _bands(panel: Axes, steps: np.ndarray, weights: np.ndarray, title: str) -> None:
    """Draw the median and shaded quantiles of `(steps, tokens)`; NaN: there is no token."""
    # NaN at every step means no token; NaN or infinity at some steps is reported in the title
    there = ~np.isnan(weights).all(axis=0)
    lost = (~np.isfinite(weights[:, there])).any(axis=1)
    finite = np.where(np.isfinite(weights), weights, np.nan)
    empty = np.isnan(finite).all(axis=1)
    finite[empty] = 0.0
    colour = style.COLOURS[1]
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
        style.set_titles(panel, title, [f"tokens at {lost.sum()} of {len(steps)} steps"])

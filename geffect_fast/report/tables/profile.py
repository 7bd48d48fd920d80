"""Tables for the terminal: totals, parts of the model, and the instances behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from geffect_fast.measure.reference import REFERENCE_IS_MODEL
from geffect_fast.report.summary.objectives import (
    UNLEARN,
    Interval,
    by_place,
    by_sample,
    shares,
    summarise,
)
from geffect_fast.results.told_apart import precision_error

if TYPE_CHECKING:
    import xarray as xr

STYLES = {
    "forgets, spares": "green",
    "forgets, little harm": "green",
    "forgets, some harm": "yellow",
    "mostly harm": "red",
    "forgets, harm unclear": "yellow",
    "within noise": "yellow",
    "hardly forgets": "yellow",
    "perhaps hardly forgets": "yellow",
    "does not forget": "red",
    "undefined (NaN)": "bold red",
}

NOTE = (
    "A descent step of size lr changes a risk by -lr·e. collateral: rise of the worst other risk "
    "for a unit rise of the forget risk. Magnitudes of e do not compare between objectives: npo "
    "and dpo are made of sums over whole sequences, most others of means over tokens. Cosines and "
    "collateral do compare."
)


def render(dataset: xr.Dataset) -> RenderableType:
    """All tables of a result, for `rich.console.Console.print`."""
    parts: list[RenderableType] = [totals_table(dataset), Text(NOTE, style="dim"), Text()]
    parts += covered(dataset.attrs)
    for risk in dataset["risk"].values:
        table = group_table(dataset, str(risk))
        if table is not None:
            parts.append(table)
    instances = instance_table(dataset)
    if instances is not None:
        parts.append(instances)
    return Group(*parts)


def totals_table(dataset: xr.Dataset) -> Table:
    """A row an objective: effect on and cosine with every risk, collateral, verdict."""
    rows = summarise(dataset)
    table = new_table(
        f"G-effect of {len(rows)} objectives on {dataset.attrs['n_forget']} forget rows"
    )
    table.add_column("objective", overflow="fold")
    risks = list(rows[0].effects)
    for risk in risks:
        table.add_column(f"e_{symbol(risk)}", justify="right", no_wrap=True)
    for risk in rows[0].cosines:
        table.add_column(f"cos_{symbol(risk)}", justify="right", no_wrap=True)
    table.add_column("collateral", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        table.add_row(
            row.objective,
            *(with_interval(e, row.intervals.get(risk)) for risk, e in row.effects.items()),
            *(number(c, "+.2f") for c in row.cosines.values()),
            with_interval(row.collateral, row.collateral_interval, ".2f"),
            Text(row.verdict, style=STYLES.get(row.verdict, "")),
        )
    return table


def group_table(dataset: xr.Dataset, risk: str) -> Table | None:
    """Signed shares of the effect on one risk by part of the model; None where parts are summed."""
    placed = by_place(dataset, blocks=False)
    if placed is None:
        return None
    labels, values = placed
    at = [str(r) for r in dataset["risk"].values].index(risk)
    table = new_table(
        f"Where e_{symbol(risk)} comes from: share of each part, sizes adding to 100 %"
    )
    table.add_column("objective", overflow="fold")
    for label in labels:
        table.add_column(label.replace("_", " "), justify="right", no_wrap=True)
    for objective, row in zip(dataset["objective"].values, shares(values[:, at]), strict=True):
        table.add_row(str(objective), *(number(100 * share, "+.0f") for share in row))
    return table


def instance_table(dataset: xr.Dataset) -> Table | None:
    """The forget row that each objective forgets most, and the one that costs `retain` most."""
    effect = by_sample(dataset)
    if effect is None or not effect.sizes["sample"]:
        return None
    table = new_table("Instances: row, share of the effect, question")
    objectives = [str(o) for o in effect["objective"].values]
    table.add_column("objective", no_wrap=True, min_width=max(map(len, objectives)))
    wanted = {UNLEARN: "forgotten most", "retain": "costs the rest most"}
    present = [r for r in wanted if r in effect["risk"].values]
    for risk in present:
        table.add_column(wanted[risk], overflow="fold")
    for objective in objectives:
        cells = []
        for risk in present:
            share = shares(effect.sel(objective=objective, risk=risk).values)
            cells.append(_extreme(effect, share))
        table.add_row(objective, *cells)
    return table


def coverage_line(counts: Mapping[str, Any]) -> str:
    """What a result covers, from the counts of a `Coverage` by name."""
    parameters, elements = counts["covered_parameters"], counts["covered_elements"]
    all_parameters, all_elements = counts["trainable_parameters"], counts["trainable_elements"]
    line = (
        f"Covered: {parameters:,} of {all_parameters:,} trainable parameters, "
        f"{elements:,} of {all_elements:,} elements"
    )
    if counts["frozen_parameters"]:
        line += (
            f"; left out: {counts['frozen_parameters']:,} frozen ones, "
            f"{counts['frozen_elements']:,} elements"
        )
    return line + "."


def symbol(risk: str) -> str:
    """How a risk is written as an index: u, r, or a probe's own name."""
    return {UNLEARN: "u", "retain": "r"}.get(risk, risk)


def number(value: float, spec: str = "+.3g") -> str:
    """A number for a cell; a dash where it is undefined, a bare 0 for zero."""
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:{spec}}"


def with_interval(value: float, interval: Interval | None, spec: str = "+.3g") -> Text:
    """A number for a cell, with its interval below it where that is known."""
    text = Text(number(value, spec))
    if interval is not None and not any(map(math.isnan, interval)) and math.isfinite(value):
        text.append(f"\n{bounds(interval, spec)}", style="dim")
    return text


def bounds(interval: Interval, spec: str = "+.3g") -> str:
    """An interval in brackets."""
    low, high = (number(bound, spec) for bound in interval)
    return f"[{low}, {high}]"


def reference_line(attrs: Mapping[str, Any]) -> str:
    """That objectives were compared with the model itself; empty where they were not."""
    if not attrs.get("reference_is_model"):
        return ""
    return f"Reference: {REFERENCE_IS_MODEL}."


def own_loss_line(attrs: Mapping[str, Any]) -> str:
    """That the model's own loss is not the risk; empty where it is."""
    if "own_loss" not in attrs:
        return ""
    return f"Model: {attrs.get('own_loss_note', attrs['own_loss'])}."


def interval_line(attrs: Mapping[str, Any]) -> str:
    """What intervals are of; empty for results without, as those of one row of each set are."""
    if "interval_level" not in attrs or attrs["n_forget"] == attrs["n_retain"] == 1:
        return ""
    return (
        f"In brackets: {100 * attrs['interval_level']:.0f} % intervals by the choice of the rows "
        f"({attrs['n_forget']} forget, {attrs['n_retain']} retain, drawn anew with replacement); "
        "nothing is called best, more or less within them."
    )


def question(effect: xr.DataArray, i: int, width: int) -> str:
    """The question of a forget row, shortened; empty where there is none."""
    text = (
        " ".join(str(effect["question"].values[i]).split()) if "question" in effect.coords else ""
    )
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def precision_line(attrs: Mapping[str, Any]) -> str:
    """How far effects in 16 bits can be trusted; empty for results in other precisions."""
    if "precision_error" in attrs:
        rows = " and ".join(map(str, attrs["precision_samples"]))
        return (
            f"Precision: effects in 16 bits may be off by "
            f"{100 * precision_error(attrs):.2g} % (thrice what float32 changes at forget row "
            f"{rows}); objectives that differ by no more are called no different."
        )
    if "precision_note" in attrs:
        return f"Precision of effects in 16 bits: {attrs['precision_note']}."
    return ""


def notes(attrs: Mapping[str, Any]) -> list[str]:
    """What a result compares with, and how far to trust it, in lines."""
    lines = (own_loss_line, reference_line, interval_line, precision_line)
    return [found for line in lines if (found := line(attrs))]


def covered(attrs: Mapping[str, Any]) -> list[Text]:
    """What a result covers, whether that was checked, how precise it is.

    Nothing for runs of older versions.
    """
    if "covered_parameters" not in attrs:
        return []
    checked = "Not compared with the whole gradient, as norms were left out."
    if attrs["coverage_checked"]:
        checked = "At each of them the shares add up to plain autograd's whole gradient."
    if attrs["engine"] == "forward":
        checked = "The forward engine moved each of them along the risks' gradients."
    lines = [Text(f"{coverage_line(attrs)} {checked}")]
    if "engine_reason" in attrs:
        lines.append(Text(f"Engine {attrs['engine']}: {attrs['engine_reason']}."))
    lines += map(Text, notes(attrs))
    return [*lines, Text()]


def _extreme(effect: xr.DataArray, share: np.ndarray) -> str:
    if not np.isfinite(share).all() or not (share < 0).any():
        return "none"
    i = int(share.argmin())
    return (
        f"{effect['sample'].values[i]}  {100 * share[i]:+.0f}%  {question(effect, i, 34)}".rstrip()
    )


def new_table(title: str) -> Table:
    """An empty table in the one style of all."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )

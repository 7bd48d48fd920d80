"""Formatting of numbers, intervals, names and notes, the same in every output."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from geffect_fast.results.form import REFERENCE_IS_MODEL
from geffect_fast.results.risks import UNLEARN
from geffect_fast.results.told_apart import precision_error

if TYPE_CHECKING:
    import xarray as xr

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)
Number = tuple[float, Interval]
"""A number with its interval, which is `UNKNOWN` where no choice of rows is known."""

# ---- risks and names ----


def in_metric(attributes: Mapping[str, Any]) -> str:
    """The part of a title that names the metric of the effects; empty for the plain one."""
    metric = attributes.get("metric")
    if metric is None:
        return ""
    return f", in the metric of {'a diagonal given' if metric == 'diagonal' else metric}"


def risk_words(risk: str) -> str:
    """The name of a risk within a sentence."""
    return f"{'forget' if risk == UNLEARN else risk} risk"


def shortened(name: str, width: int) -> str:
    """A name, cut to a width where it is longer."""
    return name if len(name) <= width else name[: width - 1] + "…"


def title_of(name: str, width: int = 44) -> str:
    """A name as a panel's title, on up to three lines."""
    return "\n".join(textwrap.wrap(name, width, max_lines=3, placeholder=" …"))


def question(effect: xr.DataArray, i: int, width: int) -> str:
    """The question of the `i`-th sample, shortened; empty where there is none."""
    if "question" not in effect.coords:
        return ""
    text = " ".join(str(effect["question"].values[i]).split())
    if len(text) <= width:
        return text
    cut = text[: width - 1]  # then back to the end of a word, where there is one
    return f"{cut[: width - 2].rpartition(' ')[0] or cut[:-1]} …"


# ---- numbers ----


def number(value: float, spec: str = "+.3g") -> str:
    """A number; a dash where it is undefined, a bare 0 for zero, no sign where it rounds to 0."""
    if math.isnan(value):
        return "–"
    text = "0" if value == 0 else f"{value:{spec}}"
    return text if math.isinf(value) or re.search("[1-9]", text) else text.lstrip("+-")


def cell(value: float, spec: str = "+.3g") -> str:
    """A number as `number` writes it, but `+∞` or `−∞` where it is infinite."""
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    return number(value, spec)


def bounds(interval: Interval, spec: str = "+.3g") -> str:
    """An interval in brackets."""
    low, high = (number(bound, spec) for bound in interval)
    return f"[{low}, {high}]"


def cell_with_interval(value: float, interval: Interval | None, spec: str = "+.3g") -> str:
    """A number, followed by its interval where the interval is known."""
    text = cell(value, spec)
    if interval is None or math.isnan(value) or any(map(math.isnan, interval)):
        return text
    low, high = (cell(bound, spec) for bound in interval)
    return f"{text} [{low}, {high}]"


def spoken(value: float) -> str:
    """A number in words that a screen reader can read out."""
    if math.isfinite(value):
        return number(value, "+.3e")
    return "not a number" if math.isnan(value) else f"{'+' if value > 0 else '-'}infinite"


# ---- coverage and notes ----


def coverage_line(counts: Mapping[str, Any]) -> str:
    """The sentence on what a result covers, from the counts of a `Coverage` by name."""
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


def interval_line(attrs: Mapping[str, Any]) -> str:
    """The note on intervals; empty where there are none, as with one row of each set."""
    if "interval_level" not in attrs or attrs["n_forget"] == attrs["n_retain"] == 1:
        return ""
    return (
        f"In brackets: {100 * attrs['interval_level']:.0f} % intervals by the choice of the rows "
        f"({attrs['n_forget']} forget, {attrs['n_retain']} retain, drawn anew with replacement); "
        "nothing is called best, more or less within them."
    )


def precision_line(attrs: Mapping[str, Any]) -> str:
    """The note on the precision of effects in 16 bits; empty for results in other precisions."""
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


def metric_line(attrs: Mapping[str, Any]) -> str:
    """The note on the metric of the effects, or of `e_P`; empty where there is only the plain one.

    The note names the optimizer whose metric it is, and the source of the optimizer's state.
    """
    if "step_metric_note" in attrs:
        return f"Metric: e_P is not known: {attrs['step_metric_note']}."
    for prefix, where in (("metric", "Effects, norms and cosines are"), ("step_metric", "e_P is")):
        if prefix in attrs:
            of = f", of the step of {attrs[f'{prefix}_of']}" if f"{prefix}_of" in attrs else ""
            return (
                f"Metric: {where} in that of {attrs[prefix]}{of}; its state: "
                f"{attrs[f'{prefix}_state']}. Momentum and weight decay are given beside it."
            )
    return ""


def notes(attrs: Mapping[str, Any]) -> list[str]:
    """Lines on what a result compares with and how far to trust it; empty ones are left out."""
    own_loss = attrs.get("own_loss_note", attrs.get("own_loss"))
    lines = [
        f"Model: {own_loss}." if "own_loss" in attrs else "",
        f"Reference: {REFERENCE_IS_MODEL}." if attrs.get("reference_is_model") else "",
        metric_line(attrs),
        interval_line(attrs),
        precision_line(attrs),
    ]
    return [line for line in lines if line]

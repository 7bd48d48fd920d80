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
"""A number and its interval by the choice of the rows; `UNKNOWN` where there is no interval."""

# ---- risks and names ----


def in_metric(attrs: Mapping[str, Any]) -> str:
    """The part of a title that names the metric of the effects; empty for the plain one."""
    return f", in {_metric_name(attrs['metric'])}" if "metric" in attrs else ""


def _metric_name(metric: str) -> str:
    return f"the metric of {'a given diagonal' if metric == 'diagonal' else metric}"


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
    """A number; no sign where it rounds to 0.

    Zero is a bare 0, an undefined number a dash, and an infinite one `+∞` or `−∞`.
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    text = "0" if value == 0 else f"{value:{spec}}"
    return text if re.search("[1-9]", text) else text.lstrip("+-")


def bounds(interval: Interval, spec: str = "+.3g") -> str:
    """An interval in brackets."""
    low, high = (number(bound, spec) for bound in interval)
    return f"[{low}, {high}]"


def number_with_interval(value: float, interval: Interval | None, spec: str = "+.3g") -> str:
    """A number, followed by its interval where the number is finite and the interval known."""
    text = number(value, spec)
    if interval is None or not math.isfinite(value) or any(map(math.isnan, interval)):
        return text
    return f"{text} {bounds(interval, spec)}"


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
    for prefix, where in (("metric", "effects, norms and cosines are"), ("step_metric", "e_P is")):
        if prefix in attrs:
            of = f", of the step of {attrs[f'{prefix}_of']}" if f"{prefix}_of" in attrs else ""
            return (
                f"Metric: {where} in {_metric_name(attrs[prefix])}{of}; its state: "
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

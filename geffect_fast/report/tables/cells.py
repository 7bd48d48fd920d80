"""What tables for the terminal are made of: cells, verdicts, and notes below."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from geffect_fast.report.format import Interval, Number, bounds, coverage_line, notes, number

WANTED, UNWANTED = "color(33)", "color(166)"
"""Blue and orange that can be read on light ground and on dark."""
STYLES = {
    "forgets, spares": WANTED,
    "forgets, little harm": WANTED,
    "mostly harm": UNWANTED,
    "does not forget": UNWANTED,
    "undefined (NaN)": f"bold {UNWANTED}",
}
"""Verdicts in a colour; those between the two, and what rows do not tell, have none."""


def with_interval(value: float, interval: Interval | None, spec: str = "+.3g") -> Text:
    """A number, with its interval below it where that is known."""
    text = Text(number(value, spec))
    if interval is not None and not any(map(math.isnan, interval)) and math.isfinite(value):
        text.append(f"\n{bounds(interval, spec)}", style="dim")
    return text


def effect_cells(numbers: Mapping[str, Number]) -> list[Text]:
    """Effects and collateral of an objective, as its summary names them."""
    specs = {"collateral": ".2f"}
    return [with_interval(*each, specs.get(name, "+.3g")) for name, each in numbers.items()]


def verdict_cell(verdict: str) -> Text:
    """A verdict in its colour."""
    return Text(verdict, style=STYLES.get(verdict, ""))


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
    lines = [f"{coverage_line(attrs)} {checked}"]
    if "engine_reason" in attrs:
        lines.append(f"The {attrs['engine']} engine measured this: {attrs['engine_reason']}.")
    if "exchanged" in attrs:
        lines.append(f"FSDP shared the model out; for products {attrs['exchanged']}.")
    return [*map(Text, lines + notes(attrs)), Text()]

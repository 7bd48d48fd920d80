"""Cells, verdicts and notes of the tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from geffect_fast.report.format import (
    Interval,
    Number,
    coverage_line,
    notes,
    number_with_interval,
)

TERMINAL_WANTED, TERMINAL_UNWANTED = "color(33)", "color(166)"
"""A blue and an orange that can be read on light and on dark ground."""
STYLES = {
    "forgets, spares": TERMINAL_WANTED,
    "forgets, little harm": TERMINAL_WANTED,
    "mostly harm": TERMINAL_UNWANTED,
    "does not forget": TERMINAL_UNWANTED,
    "undefined (NaN)": f"bold {TERMINAL_UNWANTED}",
}
"""Colours of verdicts. Verdicts between the two, and those that the rows do not tell, have none."""


def with_interval(value: float, interval: Interval | None, spec: str = "+.3g") -> Text:
    """A number, with its interval on a line below where the interval is known."""
    shown, _, known = number_with_interval(value, interval, spec).partition(" ")
    return Text(shown).append(f"\n{known}" if known else "", style="dim")


def effect_cells(numbers: Mapping[str, Number]) -> list[Text]:
    """Cells with an objective's effects and collateral, in the order of its summary."""
    specs = {"collateral": ".2f"}
    return [with_interval(*each, specs.get(name, "+.3g")) for name, each in numbers.items()]


def verdict_cell(verdict: str) -> Text:
    """A verdict in its colour."""
    return Text(verdict, style=STYLES.get(verdict, ""))


def covered(attrs: Mapping[str, Any]) -> list[Text]:
    """Notes on a result's coverage, whether the coverage was checked, the engine and precision.

    A result of an older version, which does not hold its coverage, has none.
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

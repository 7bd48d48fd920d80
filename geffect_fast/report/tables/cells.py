"""What tables for the terminal are made of: their one style, columns, cells, and notes below."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from geffect_fast.report.format import Interval, Number, bounds, coverage_line, notes, number

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

WHOLE: dict[str, Any] = {"no_wrap": True}
"""Layout of a column of words that stay on one line."""
FOLDED: dict[str, Any] = {"overflow": "fold"}
"""Layout of a column of words that may wrap."""


def new_table(title: str, *columns: str | tuple[str, dict[str, Any]]) -> Table:
    """An empty table in the one style of all.

    Args:
        title: of the table.
        columns: a name alone for numbers; a name and its layout, as `rich` takes it, for words.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        name, layout = (column, WHOLE | {"justify": "right"}) if isinstance(column, str) else column
        table.add_column(name, **layout)
    return table


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


def verdict_cell(verdict: str, shown: str = "") -> Text:
    """A verdict in its colour; `shown` is the verdict broken into lines."""
    return Text(shown or verdict, style=STYLES.get(verdict, ""))


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
        lines.append(f"Engine {attrs['engine']}: {attrs['engine_reason']}.")
    return [*map(Text, lines + notes(attrs)), Text()]

"""Rows of bench_gpu_engines.py as text and as a table of the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
STEP, OURS = "training step", "geffect_fast"
COLUMNS = {
    "samples": ("samples", "{}", 7),
    "seconds": ("seconds", "{:.4g}", 9),
    "of_step": ("of a step", "{:.2f}", 9),
    "kernels": ("kernels", "{:,.0f}", 9),
    "waits": ("waits", "{:,.0f}", 6),
    "busy_percent": ("busy %", "{:.0f}", 6),
    "peak_gib": ("GiB", "{:.1f}", 6),
    "difference": ("differs by", "{:.1e}", 10),
}


def cell(row: Row, key: str) -> str:
    """A value as text, empty where there is none."""
    form = COLUMNS[key][1]
    return "" if row[key] == "" else form.format(row[key] if form == "{}" else float(row[key]))


def row_line(row: Row) -> str:
    """A row in the order of COLUMNS, and the remark on the row."""
    cells = " ".join(f"{cell(row, key):>{width}}" for key, (_, _, width) in COLUMNS.items())
    return f"{row['what']:58} {cells}  {row['problem'] or row['how']}".rstrip()


def report(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    """All rows by section, and the names of the parts that were left out."""
    head = " ".join(f"{name:>{width}}" for name, _, width in COLUMNS.values())
    lines = ["", f"{'':58} {head}"]
    for section in dict.fromkeys(row["section"] for row in rows):
        lines += ["", section, *(row_line(row) for row in rows if row["section"] == section)]
    lines += [
        "",
        f"left out for lack of time: {len(left_out)}",
        *(f"  {name}" for name in left_out),
    ]
    return "\n".join(lines)


def readme_table(rows: Sequence[Row]) -> str:
    """The timed rows as a table of Markdown, and the machine of the measurement."""
    shown = [key for key in COLUMNS if key != "difference"]
    lines = [
        f"| what | {' | '.join(COLUMNS[key][0] for key in shown)} |",
        f"|---|{'---:|' * len(shown)}",
    ]
    for row in rows:
        if row["seconds"] != "":
            lines.append(f"| {row['what']} | {' | '.join(cell(row, key) for key in shown)} |")
    first = rows[0]
    problems = [f"{row['what']}: {row['problem']}." for row in rows if row["problem"]]
    lines += [
        "",
        f"{first['gpu']}, driver {first['driver']}, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {first['commit'] or 'unknown'}, {first['date']}.",
        *problems,
    ]
    return "\n".join(lines)

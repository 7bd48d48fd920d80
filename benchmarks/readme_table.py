"""Rewrite the tables of README.md from the committed CSVs.

python benchmarks/readme_table.py            # rewrites
python benchmarks/readme_table.py --check    # exit 1 where README.md differs
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- {}: benchmarks/readme_table.py -->", "<!-- end of {} -->"


def read(name: str) -> list[dict[str, str]]:
    """The rows of a committed CSV."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def machine_line(row: dict[str, str]) -> str:
    """What was measured on, for under a table."""
    return (
        f"{row['cpu']}, {row['threads']} threads, torch {row['torch']}, {row['date']}; "
        "ratios within one run."
    )


def sweep_table() -> str:
    """The sweep and single objectives against their baselines."""
    rows = read("sweep_cpu.csv")
    lines = ["| what | against | theirs | ours | ratio |", "|---|---|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['baseline']} | {float(row['baseline_s']):.3g} s "
            f"| {float(row['ours_s']):.3g} s | {float(row['ratio']):.3g} x |"
        )
    return "\n".join([*lines, "", machine_line(rows[0])])


def ops_table() -> str:
    """Every op against the same formula in plain torch."""
    rows = read("ops_cpu.csv")
    kernels = {(r["op"], r["shape"]): r for r in rows if r["candidate"] == "kernel"}
    lines = [
        "| op | shape | time of plain torch / ours | extra memory, plain torch -> ours |",
        "|---|---|---:|---:|",
    ]
    for row in rows:
        if row["candidate"] == "reference":
            ours = kernels[row["op"], row["shape"]]
            lines.append(
                f"| `{row['op']}` | {row['shape']} | {float(row['ratio']):.2f} x "
                f"| {float(row['peak_extra_mb']):.0f} -> {float(ours['peak_extra_mb']):.0f} MB |"
            )
    return "\n".join([*lines, "", machine_line(rows[0])])


def rewritten(text: str) -> str:
    """README with its tables made anew."""
    for name, table in (("sweep", sweep_table()), ("ops", ops_table())):
        begin, end = BEGIN.format(name), END.format(name)
        head, rest = text.split(begin)
        text = f"{head}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not write, exit 1 on a difference")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = rewritten(before)
    if check:
        return int(before != after)
    readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

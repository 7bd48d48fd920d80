"""Rows of bench_gpu.py as text and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
OURS = "ours"
# A part that an op needs in any case, timed alone: not a way to compute the op.
PARTS = ("mm_alone",)
MOST_CHARACTERS = 9_500
WORST = 7  # cases of each op that the table shows
MOST_PROBLEMS = 15
MISCHOSEN = 20  # cases for which another form would have been faster


def is_baseline(provider: str) -> bool:
    """Whether a row is another way to compute the op, rather than one of its forms or a part."""
    return not provider.startswith(OURS) and provider not in PARTS


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """The measured rows by (op, shape, dtype) and provider, where ours was measured."""
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        key = row["op"], row["shape"], row["dtype"]
        cases.setdefault(key, {})[row["provider"]] = row
    return {key: found for key, found in cases.items() if OURS in found}


def fastest_baseline(case: Mapping[str, Row]) -> float | None:
    """Time of the fastest plain torch over ours."""
    ratios = [float(row["ratio"]) for name, row in case.items() if is_baseline(name)]
    return min(ratios, default=None)


def spread(values: Sequence[float], digits: int) -> str:
    """Least, median and greatest value."""
    found = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{value:.{digits}f}" for value in found)


def case_line(key: tuple[str, str, str], case: Mapping[str, Row]) -> str:
    """One case: our time, its share of the roofline, and the times of all others over ours."""
    ours = case[OURS]
    others = " ".join(
        f"{name.removeprefix('ours:')} {float(row['ratio']):.2f}"
        for name, row in case.items()
        if name != OURS
    )
    share = float(ours["percent_of_roofline"])
    return (
        f"{key[1]:34s} {key[2]:8s} {float(ours['ms']):9.4f} ms {share:4.0f} %"
        f" {float(ours['peak_mb']):7.1f} MB | {others}"
    )


def summary_lines(cases: Mapping[tuple[str, str, str], Mapping[str, Row]]) -> list[str]:
    """A line for each op and dtype."""
    lines = [
        f"{'op':18s} {'dtype':8s} {'n':>3s}  baseline/ours        roofline %       mm_alone/ours"
    ]
    for op, dtype in dict.fromkeys((op, dtype) for op, _, dtype in cases):
        chosen = [case for key, case in cases.items() if (key[0], key[2]) == (op, dtype)]
        ratios = [ratio for case in chosen if (ratio := fastest_baseline(case)) is not None]
        roofline = [float(case[OURS]["percent_of_roofline"]) for case in chosen]
        alone = [float(case[part]["ratio"]) for case in chosen for part in PARTS if part in case]
        lines.append(
            f"{op:18s} {dtype:8s} {len(chosen):3d}  {spread(ratios, 2) if ratios else '-':20s}"
            f" {spread(roofline, 0):16s} {spread(alone, 2) if alone else ''}"
        )
    return lines


def choice_lines(cases: Mapping[tuple[str, str, str], Mapping[str, Row]]) -> list[str]:
    """Cases where a form that the op did not choose is more than 3 % faster, the worst first."""
    found = []
    n_cases = 0
    for key, case in cases.items():
        of_form = {
            name.partition(":")[2]: float(row["ratio"]) for name, row in case.items() if ":" in name
        }
        n_cases += bool(of_form)
        best = min(of_form, key=of_form.__getitem__, default=None)
        if best is not None and of_form[best] < 0.97:
            all_forms = " ".join(f"{name} {ratio:.2f}" for name, ratio in of_form.items())
            found.append((of_form[best], f"{key[0]} {key[1]} {key[2]}: {best} | {all_forms}"))
    if not n_cases:
        return []
    head = f"Another form is faster than the chosen one in {len(found)} of {n_cases} cases"
    return ["", head, *(line for _, line in sorted(found)[:MISCHOSEN])]


def report(rows: Sequence[Row], problems: Sequence[str]) -> str:
    """A table that fits MOST_CHARACTERS: a summary, and each op's worst cases first."""
    cases = by_case(rows)
    lines = ["", "Least / median / greatest; baseline: the fastest plain torch of each case.", ""]
    lines += summary_lines(cases) + choice_lines(cases)
    if problems:
        lines += ["", f"Not timed: {len(problems)}", *(p[:200] for p in problems[:MOST_PROBLEMS])]
    for op in dict.fromkeys(key[0] for key in cases):
        chosen = [(key, case) for key, case in cases.items() if key[0] == op]
        chosen.sort(key=lambda item: fastest_baseline(item[1]) or 0)
        shown = min(WORST, len(chosen))
        lines += ["", f"{op}: the worst {shown} of {len(chosen)} cases | others' times over ours"]
        lines += [case_line(key, case) for key, case in chosen[:WORST]]
    text = "\n".join(lines)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 6] + "\n(cut)"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Ratios and shares of the roofline, a dot a case, op by op."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    cases = by_case(rows)
    ops = list(dict.fromkeys(key[0] for key in cases))
    dtypes = list(dict.fromkeys(key[2] for key in cases))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.7 * len(ops) + 2), sharey=True)
    for d, dtype in enumerate(dtypes):
        for axis, value in (
            (left, fastest_baseline),
            (right, lambda case: float(case[OURS]["percent_of_roofline"])),
        ):
            found = [
                (value(case), ops.index(key[0]) + 0.2 * (d - (len(dtypes) - 1) / 2))
                for key, case in cases.items()
                if key[2] == dtype and value(case) is not None
            ]
            x, y = zip(*found, strict=True) if found else ((), ())
            axis.scatter(x, y, s=18, alpha=0.6, label=dtype)
    left.set_xscale("log")
    left.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_locator(ticker.NullLocator())
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("time of the fastest plain torch / ours")
    left.set_yticks(range(len(ops)), ops)
    left.invert_yaxis()
    right.axvline(100, color="black", linewidth=0.8)
    right.set_xlim(left=0)
    right.set_xlabel("% of the measured roofline")
    right.legend(loc="best", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

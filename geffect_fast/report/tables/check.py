"""The tables of a check for the terminal: a row a kind of parameters, coverage and verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from geffect_fast.measure.check import QUANTITIES, Check, KindCheck
from geffect_fast.report.format import coverage_line
from geffect_fast.report.tables.cells import TERMINAL_UNWANTED, TERMINAL_WANTED
from geffect_fast.report.tables.fitted import FittedTable

NAMES_SHOWN = 8
HEAD = ("kind", "captured by", "number", *QUANTITIES, "effects, abs.", "of limit")


def render_check(check: Check) -> Group:
    """The table, facts and verdict of a check, for `rich.console.Console.print`."""
    table = FittedTable(caption(check), HEAD, HEAD[:2])
    for kind in check.kinds:
        table.add_row(*kind_cells(kind), style=TERMINAL_UNWANTED if kind.excess > 1 else "")
    lines = [Text(note(check), style="dim"), Text()]
    lines += [Text(line) for line in facts(check)]
    style = f"bold {TERMINAL_WANTED if check.exact else TERMINAL_UNWANTED}"
    return Group(table, *lines, Text(), Text(verdict(check), style=style))


def caption(check: Check) -> str:
    """The table's title: the objectives, and the samples that they were checked on."""
    return (
        f"{', '.join(check.objectives)} on {check.n_samples} samples ({check.n_tokens} tokens): "
        "geffect_fast against plain autograd, one sample at a time"
    )


def kind_cells(kind: KindCheck) -> list[str]:
    """The cells of a kind of parameters, in the columns of `HEAD`."""
    return [
        kind.kind,
        " + ".join(kind.rules) or "nothing",
        str(kind.n_parameters),
        *(f"{kind.relative[quantity]:.1e}" for quantity in QUANTITIES),
        f"{kind.absolute['effects']:.1e}",
        f"{kind.excess:.3g}",
    ]


def verdict(check: Check) -> str:
    """One sentence that says whether the effects are exact, and where they are not."""
    if check.exact:
        within = f"within {check.tolerance:.0e} ({check.dtype})"
        if check.wider is not None:
            within = f"within {check.tolerance:.0e} of its numbers in {check.wider}"
        if check.rounding_measured:
            within = f"as closely as plain autograd does in {check.dtype}"
        return (
            f"Exact: all {check.coverage.trainable_parameters} trainable parameters agree with "
            f"plain autograd, sample by sample, {within}."
        )
    faults = [_fault(kind) for kind in check.kinds if kind.excess > 1]
    if check.uncovered:
        faults.append(f"no rule captured {_names(check.uncovered)}")
    coarse = check.dtype in ("bfloat16", "float16")
    hint = " Check in float32 (--dtype) to tell a fault from rounding." if coarse else ""
    return f"Deviation: {'; '.join(faults)}.{hint}"


def facts(check: Check) -> list[str]:
    """Sentences on the layout and the coverage, one each.

    Further sentences name tied parameters, a loss of the model's own, and parameters without a
    gradient on these samples.
    """
    layouts = {
        "packed": "several in one row",
        "equal_length": "those of one length side by side",
        "single": "one at a time",
    }
    said = [
        f"Layout: {check.layout}, samples run {layouts[check.layout]}.",
        coverage_line(vars(check.coverage)),
    ]
    said += [f"Tied: {' = '.join(names)}." for names in check.coverage.tied]
    if check.own_loss is not None:
        said.append(f"Model: {check.own_loss}.")
    if check.unreached:
        said.append(f"Without a gradient on these samples: {_names(check.unreached)}.")
    return said


def note(check: Check) -> str:
    """The note below the table: what errors are relative to, and the limit of rounding."""
    relative = (
        "Largest errors, relative to the parameter's largest share (or, where that is more, a "
        "thousandth of the model's for norms, a millionth for effects and products). "
    )
    if check.wider is None:
        return relative + f"Limit: {check.tolerance:.0e}."
    limit = f"{check.tolerance:.1e}, which is rounding in {check.dtype}"
    if check.rounding_measured:
        limit = f"twice that of plain autograd in {check.dtype}, plus {check.tolerance:.1e}"
    return relative + (
        f"Errors are measured against {check.wider} on the same weights; limit of their root mean "
        f"square: {limit}."
    )


def _fault(kind: KindCheck) -> str:
    worst = max(QUANTITIES, key=lambda q: kind.judged[q] / kind.limit[q])
    return (
        f"{kind.kind} (captured by {' + '.join(kind.rules) or 'nothing'}): {worst} off by "
        f"{kind.relative[worst]:.1e}, most at {kind.worst}"
    )


def _names(names: Sequence[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

"""`geffect-fast objectives`."""

from __future__ import annotations


def objectives() -> None:
    """List the objectives there are: what each is, its parameters, what it reads and needs.

    They add up and scale: 'npo(beta=0.1) + 0.5*kl'. A range in place of a number is a sweep.
    """
    from rich.text import Text

    from geffect_fast.cli.printing import console
    from geffect_fast.objectives.registry import REQUIRED, described_objectives
    from geffect_fast.report.tables.cells import FOLDED, new_table

    options = {
        "a reference": "--reference",
        "refusals": "--refusals",
        "weights": "weights in the rows",
    }
    table = new_table(
        f"Objectives, with their parameters as they are unless given ({REQUIRED}: has to be given)",
        ("objective", FOLDED),
        ("what is descended on", FOLDED),
        ("rows", FOLDED),
        ("needs", FOLDED),
    )
    for each in described_objectives():
        table.add_row(
            Text(each.text),
            Text(each.about.replace("`", "")),
            " and ".join(each.sets),
            ", ".join(options[need] for need in each.needs),
        )
    console().print(table)

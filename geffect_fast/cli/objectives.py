"""`geffect-fast objectives`."""

from __future__ import annotations


def objectives() -> None:
    """List all objectives, with their parameters, the rows they read and what else they need.

    Objectives can be added and scaled: 'npo(beta=0.1) + 0.5*kl'. A range in place of a number is a
    sweep. A second table lists the trainers of open-unlearning, whose names stand for their whole
    losses.
    """
    from rich.text import Text

    from geffect_fast.cli.printing import console
    from geffect_fast.objectives.open_unlearning import described_trainers
    from geffect_fast.objectives.registry import REQUIRED, described_objectives
    from geffect_fast.report.tables.fitted import FittedTable

    options = {
        "a reference": "--reference",
        "refusals": "--refusals",
        "weights": "weights in the rows",
    }
    heads = ["objective", "what is descended on", "rows", "needs"]
    table = FittedTable(
        f"Objectives, with the default values of their parameters ({REQUIRED}: must be given)",
        heads,
        heads,
    )
    for each in described_objectives():
        table.add_row(
            Text(each.text),
            Text(each.about.replace("`", "")),
            " and ".join(each.sets),
            ", ".join(options[need] for need in each.needs),
        )
    console().print(table)
    heads = ["trainer", "objective", "where its released code differs"]
    theirs = FittedTable(
        "Trainers of open-unlearning by name, in the objectives above (docs/open_unlearning.md)",
        heads,
        heads,
    )
    for trainer in described_trainers():
        theirs.add_row(Text(trainer.text), Text(trainer.objective), Text(trainer.differs or "-"))
    console().print(theirs)

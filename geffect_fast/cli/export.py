"""`geffect-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from geffect_fast.cli.options import Run, given_path, option
from geffect_fast.visible import one_line


def export(
    run: Run,
    to: Annotated[
        Path, option("--to", help="File to write; ends in .csv or .parquet.", parser=given_path)
    ],
    overwrite: Annotated[bool, option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a run as one long table with a row for each G-effect and its coordinates.

    Coordinates are objective, risk, parameter, sample and others that the run resolves. The table
    of a run of evaluate, control or relearn has a row for each measure: of a data set, with its
    bounds, or of a row of data.
    """
    from geffect_fast.storage.evaluation import holds_evaluation, open_evaluation
    from geffect_fast.storage.export import export as write_table
    from geffect_fast.storage.run_folder import open_run

    if holds_evaluation(run):
        print(one_line(str(write_table(open_evaluation(run), to, overwrite))))
        return
    with open_run(run, lazy=True) as dataset:
        print(one_line(str(write_table(dataset, to, overwrite))))

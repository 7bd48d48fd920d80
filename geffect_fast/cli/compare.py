"""`geffect-fast compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geffect_fast.cli.options import Overwrite, Quiet, given_path, option
from geffect_fast.cli.printing import console
from geffect_fast.errors import InputError
from geffect_fast.visible import one_line


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders with steps, two or more.", show_default=False, parser=given_path
        ),
    ],
    out: Annotated[
        Path,
        option(
            "--out",
            "-o",
            help="Folder for tables and plots; by default compare/.",
            parser=given_path,
        ),
    ] = Path("compare"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare runs of unlearn, or of profile --checkpoints, step by step.

    On the steps and risks that all runs share, effects, risks, groups of the model and the cost of
    removal are drawn side by side. The folder gets summary.csv (one row for each run), compare.csv
    (one row for each run and step) and plots/ as PNG and SVG. Runs are named by their folders.
    """
    from geffect_fast.paths import is_there, user_path
    from geffect_fast.report import write_comparison_plots
    from geffect_fast.report.summary.runs import write_comparison
    from geffect_fast.report.tables.compare import render_comparison
    from geffect_fast.steps.compare import compare as align
    from geffect_fast.storage.inputs import result_sums
    from geffect_fast.storage.lock import locked
    from geffect_fast.storage.run_folder import (
        CONFIG,
        PLOTS,
        RESULTS,
        check_free,
        run_names,
        staged_run,
    )
    from geffect_fast.storage.save_run import add_report

    folder = check_free(out, overwrite)
    if any(is_there(folder / name) for name in (RESULTS, CONFIG)):
        raise InputError(f"--out {out} is the folder of a run; choose another")
    given = [str(run) for run in runs]
    names = run_names(given)
    named = len(names) == len(given)  # else a run is given twice, which `align` refuses
    aligned = align(dict(zip(names, given, strict=True)) if named else given)
    with locked(out):
        with staged_run(out, overwrite, sums=lambda: result_sums(runs)) as staging:
            write_comparison(aligned, staging)
        again = "the same command with --overwrite"
        add_report(folder, aligned, write_comparison_plots, again)
    if not quiet:
        console().print(render_comparison(aligned))
        for path in [out, *sorted((user_path(out) / PLOTS).glob("*.png"))]:
            print(one_line(str(path)))

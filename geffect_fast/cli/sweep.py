"""`geffect-fast sweep`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from geffect_fast.cli.options import (
    SWEEP_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    config_options,
)
from geffect_fast.cli.profile import run_profile


@config_options(SWEEP_FIELDS)
def sweep(
    *,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OBJECTIVE",
            help="Objectives beside those of --objectives.",
            show_default=False,
        ),
    ] = None,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Profile objectives at many values of their hyper-parameters, and find the best of them.

    A range 0.1:7:30 stands for 30 evenly spaced values, 0.01:4:30,log for 30 values evenly spaced
    in the logarithm. Several ranges in one objective make a grid. ga + 0.1:2:5*kl sweeps a
    coefficient.

    The folder holds the files of a profile. results.nc and summary.csv name the values of every
    objective, and plots/ gets sweep.png and pareto.png. geffect-fast sweep --config run/run.yaml
    replays the run.
    """
    listed = [*given.get("objectives", []), *(more or [])]
    given = given | ({"objectives": listed} if listed else {})
    run_profile("sweep", given, config, out, overwrite, quiet)

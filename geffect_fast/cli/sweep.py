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
from geffect_fast.cli.profile import run


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

    A range 0.1:7:30 stands for 30 evenly spaced values, 0.01:4:30,log for as many evenly spaced in
    the logarithm; several in one objective make a grid, and ga + 0.1:2:5*kl sweeps a coefficient.

    The folder is that of a profile; results.nc and summary.csv say which value is whose, and
    plots/ gets sweep.png and pareto.png. geffect-fast sweep --config run/run.yaml replays it.
    """
    listed = [*given.get("objectives", []), *(more or [])]
    run("sweep", given | ({"objectives": listed} if listed else {}), config, out, overwrite, quiet)

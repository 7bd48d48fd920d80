"""`geffect-fast control`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from geffect_fast.cli.evaluation import checked_values, run_evaluation
from geffect_fast.cli.options import (
    CONTROL_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    config_options,
    given_path,
    option,
    option_names,
    values_of,
)
from geffect_fast.control_settings import ControlConfig


@config_options(CONTROL_FIELDS)
def control(
    more_models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Further unlearned models.", show_default=False),
    ] = None,
    *,
    out: Out,
    save: Annotated[
        Path | None,
        option(
            "--save",
            help="A new folder for the mixed models, one folder per method.",
            parser=given_path,
        ),
    ] = None,
    config: ConfigFile = None,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare unlearned models at equal retention (Unlearning with Control, arXiv 2406.09179).

    Each model is mixed with the original, weight by weight, in the largest share that keeps TAU of
    the original's METRIC on the retain data. The mixed models are measured. The folder holds
    evaluation.nc (NetCDF; geffect_fast.open_evaluation reads it), summary.csv, report.html, plots/
    and run.yaml, which replays the run.
    """
    if more_models:
        given = given | {"unlearned": [*given.get("unlearned", []), *more_models]}
    values = values_of(config, given)
    needed = ("original", "unlearned", "retain")
    checked = checked_values(ControlConfig, needed, config, values, option_names(given))

    from geffect_fast.measure.execute_control import execute_control

    run_evaluation(execute_control, checked, out, config, overwrite, quiet, save=save)

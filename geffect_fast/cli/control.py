"""`geffect-fast control`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from geffect_fast.arguments import checked_config
from geffect_fast.cli.options import (
    CONTROL_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    check_command,
    config_input,
    config_options,
    given_path,
    option,
    option_names,
    values_of,
)
from geffect_fast.cli.printing import print_evaluation
from geffect_fast.control_settings import ControlConfig
from geffect_fast.errors import InputError


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

    Each is mixed with the original, weight by weight, in the largest share that keeps TAU of the
    original's METRIC on the retain data, and measured there. The folder holds evaluation.nc
    (NetCDF; geffect_fast.open_evaluation reads it), summary.csv and run.yaml, which replays it.
    """
    if more_models:
        given = given | {"unlearned": [*given.get("unlearned", []), *more_models]}
    values = values_of(config, given)
    check_command(config, values.get("command", "control"), "control")
    for name in ("original", "unlearned", "retain"):
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")
    checked = checked_config(
        ControlConfig, values | {"command": "control"}, str(config or ""), option_names(given)
    )

    from geffect_fast.measure.execute_control import execute_control

    dataset = execute_control(
        checked,
        out,
        save=save,
        overwrite=overwrite,
        progress=not quiet,
        inputs=config_input(config, False),
    )
    if not quiet:
        print_evaluation(dataset, out)

"""`geffect-fast relearn`."""

from __future__ import annotations

from typing import Any

from geffect_fast.arguments import checked_config
from geffect_fast.cli.options import (
    RELEARN_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    check_command,
    config_input,
    config_options,
    option_names,
    values_of,
)
from geffect_fast.cli.printing import print_evaluation
from geffect_fast.errors import InputError
from geffect_fast.relearn_settings import PRESETS, RelearnConfig


@config_options(RELEARN_FIELDS)
def relearn(
    *,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train an unlearned model briefly on a few forget rows, and measure what comes back.

    Of the rows trained on and of the others, step by step, beside the same for the original and a
    retrained model. A preset names a published attack's settings. No model is written. The folder
    holds evaluation.nc (NetCDF; geffect_fast.open_evaluation reads it), summary.csv and run.yaml,
    which replays it.
    """
    values = values_of(config, given)
    # a file holds every setting: those that the option's preset names are not the file's any more
    for name in PRESETS.get(given.get("preset", ""), {}).keys() - given.keys():
        values.pop(name, None)
    check_command(config, values.get("command", "relearn"), "relearn")
    for name in ("model", "forget"):
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")
    checked = checked_config(
        RelearnConfig,
        values | {"command": "relearn"},
        str(config or ""),
        option_names(given, n_rows="--rows"),
    )

    from geffect_fast.training.execute_relearn import execute_relearn

    dataset = execute_relearn(
        checked,
        out,
        overwrite=overwrite,
        progress=not quiet,
        inputs=config_input(config, False),
    )
    if not quiet:
        print_evaluation(dataset, out)

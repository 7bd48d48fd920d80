"""`geffect-fast profile`."""

from __future__ import annotations

from typing import Any

from geffect_fast.cli.options import (
    PROFILE_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    config_options,
    option_names,
)
from geffect_fast.cli.printing import print_result
from geffect_fast.errors import InputError
from geffect_fast.runs.config import make_config, read_values


@config_options(PROFILE_FIELDS)
def profile(
    *,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Profile objectives on a model and data, and write a run folder.

    The folder holds results.nc (NetCDF; geffect_fast.open_run reads it), summary.csv, plots/ and
    run.yaml, which replays the run: geffect-fast profile --config run/run.yaml --out NEW.
    """
    values = given if config is None else read_values(config) | given
    for name in ("model", "forget", "retain", "objectives"):
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")
    checked = make_config(values, str(config or ""), option_names(given))

    from geffect_fast.report import write_report
    from geffect_fast.runs.execute import execute

    dataset = execute(checked, out, overwrite=overwrite, progress=not quiet, report=write_report)
    if not quiet:
        print_result(dataset, out)

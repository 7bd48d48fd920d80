"""`geffect-fast profile`, and what every command that makes a run folder does."""

from __future__ import annotations

from pathlib import Path
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
    run("profile", given, config, out, overwrite, quiet)


def run(
    command: str,
    given: dict[str, Any],
    config: Path | None,
    out: Path,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run what options and a config file say, write the folder and print what was found.

    Args:
        command: profile or sweep.
        given: config fields that come from options.
        config: a file of further ones.
        out: run folder.
        overwrite: whether to replace a run that is there.
        quiet: whether to print nothing.
    """
    values = given if config is None else read_values(config) | given
    for name in ("model", "forget", "retain", "objectives"):
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")
    held = values.get("command", command)
    if (held, command) == ("sweep", "profile"):
        raise InputError(f"config {config} is of a sweep; use geffect-fast sweep --config {config}")
    values = values | {"command": command if held == "profile" else held}
    checked = make_config(values, str(config or ""), option_names(given))

    from geffect_fast.report import write_report
    from geffect_fast.runs.execute import execute

    dataset = execute(checked, out, overwrite=overwrite, progress=not quiet, report=write_report)
    if not quiet:
        print_result(dataset, out)

"""`geffect-fast profile`, and the run that `profile` and `sweep` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geffect_fast.arguments import make_config
from geffect_fast.cli.options import (
    PROFILE_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    Resume,
    begun_config,
    check_command,
    check_given,
    config_input,
    config_options,
    option_names,
    values_of,
)
from geffect_fast.cli.printing import print_result
from geffect_fast.errors import InputError


@config_options(PROFILE_FIELDS)
def profile(
    *,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Profile objectives on a model and data, and write a run folder.

    The folder holds results.nc (NetCDF; geffect_fast.open_run reads it), summary.csv, plots/ and
    run.yaml, which replays the run: geffect-fast profile --config run/run.yaml --out NEW. With
    --checkpoints 'out/checkpoint-*' the folder also gets steps/, with one file for each checkpoint
    while the run goes on, and --resume goes on with a run that was stopped.
    """
    run_profile("profile", given, config, out, overwrite, quiet, resume)


def run_profile(
    command: str,
    given: dict[str, Any],
    config: Path | None,
    out: Path,
    overwrite: bool,
    quiet: bool,
    resume: bool = False,
) -> None:
    """Run a profile or sweep from options and a config file, write its folder and print its result.

    Args:
        command: profile or sweep.
        given: config fields that come from options.
        config: a file with further fields, if any.
        out: run folder.
        overwrite: whether to replace a run that is there.
        quiet: whether to print nothing.
        resume: whether to resume a run of checkpoints that is there.

    Raises:
        InputError: a field is missing or unusable, or the config belongs to another command.
    """
    config = begun_config(config, out, resume)
    values = values_of(config, given)
    held = values.get("command", command)
    check_command(config, held, "profile", *(["sweep"] if command == "sweep" else []))
    needed = ("forget", "retain", "objectives")
    check_given(values, needed if values.get("checkpoints") else ("model", *needed))
    values = values | {"command": command if held == "profile" else held}
    checked = make_config(values, str(config or ""), option_names(given))

    from geffect_fast.measure.execute import execute
    from geffect_fast.report import write_report
    from geffect_fast.steps.execute import execute_checkpoints

    how: dict[str, Any] = {"overwrite": overwrite, "progress": not quiet, "report": write_report}
    how["inputs"] = config_input(config, resume)
    if checked.checkpoints:
        dataset = execute_checkpoints(checked, out, resume=resume, **how)
    elif resume:
        raise InputError("--resume goes with --checkpoints; leave it out")
    else:
        dataset = execute(checked, out, **how)
    if not quiet:
        print_result(dataset, out)

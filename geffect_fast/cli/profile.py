"""`geffect-fast profile`, and what every command that makes a run folder does."""

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
    --checkpoints 'out/checkpoint-*' it gets steps/, a file a checkpoint, while the run goes, and
    --resume goes on with one that was stopped.
    """
    run("profile", given, config, out, overwrite, quiet, resume)


def run(
    command: str,
    given: dict[str, Any],
    config: Path | None,
    out: Path,
    overwrite: bool,
    quiet: bool,
    resume: bool = False,
) -> None:
    """Run what options and a config file say, write the folder and print what was found.

    Args:
        command: profile or sweep.
        given: config fields that come from options.
        config: a file of further ones.
        out: run folder.
        overwrite: whether to replace a run that is there.
        quiet: whether to print nothing.
        resume: whether to go on with a run of checkpoints that is there.
    """
    config = begun_config(config, out, resume)
    values = values_of(config, given)
    held = values.get("command", command)
    check_command(config, held, "profile", *(["sweep"] if command == "sweep" else []))
    needed = ("forget", "retain", "objectives")
    for name in needed if values.get("checkpoints") else ("model", *needed):
        if values.get(name) is None:
            raise InputError(f"--{name} is missing; give it, or a --config that holds it")
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

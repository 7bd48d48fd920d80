"""The steps that `evaluate`, `control` and `relearn` share: checked config, execution, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from geffect_fast.arguments import checked_config
from geffect_fast.cli.options import check_command, check_given, config_input
from geffect_fast.cli.printing import print_evaluation
from geffect_fast.settings import Settings

C = TypeVar("C", bound=Settings)


def checked_values(
    kind: type[C],
    needed: Sequence[str],
    config: Path | None,
    values: Mapping[str, Any],
    names: Mapping[str, str],
) -> C:
    """The config of a command from its fields' values.

    Args:
        kind: the class of config.
        needed: fields that must be given.
        config: the file that some values come from, if any.
        values: values by field.
        names: options by field, for messages.

    Raises:
        InputError: the file belongs to another command, or a value is missing or unusable.
    """
    command = kind.model_fields["command"].default
    check_command(config, values.get("command", command), command)
    check_given(values, needed)
    return checked_config(kind, {**values, "command": command}, str(config or ""), names)


def run_evaluation(
    execute: Callable[..., Any],
    checked: Settings,
    out: Path,
    config: Path | None,
    overwrite: bool,
    quiet: bool,
    **more: Any,
) -> None:
    """Execute a config and print its tables.

    Args:
        execute: writes the run folder.
        checked: the config.
        out: the run folder.
        config: the file that the config comes from, if any.
        overwrite: whether to replace a run that is there.
        quiet: whether to print nothing.
        more: further arguments of `execute`.
    """
    from geffect_fast.report import write_report

    dataset = execute(
        checked,
        out,
        overwrite=overwrite,
        progress=not quiet,
        report=write_report,
        inputs=config_input(config, False),
        **more,
    )
    if not quiet:
        print_evaluation(dataset, out)

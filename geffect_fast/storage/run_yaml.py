"""`run.yaml`: the settings of a run, written beside its results and read for a replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from geffect_fast.arguments import checked_config
from geffect_fast.control_settings import ControlConfig
from geffect_fast.data.files import check_regular
from geffect_fast.errors import InputError, in_one_line
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.relearn_settings import RelearnConfig
from geffect_fast.settings import ProfileConfig, RunConfig
from geffect_fast.unlearn_settings import UnlearnConfig
from geffect_fast.visible import one_line, visible

AnyConfig = RunConfig | EvaluateConfig | ControlConfig | RelearnConfig
"""The kinds of config that a `run.yaml` may hold."""

KINDS: dict[str, type[AnyConfig]] = {
    "profile": ProfileConfig,
    "sweep": ProfileConfig,
    "unlearn": UnlearnConfig,
    "evaluate": EvaluateConfig,
    "control": ControlConfig,
    "relearn": RelearnConfig,
}
"""Kinds of config by the command that writes them into a `run.yaml`."""

CONFIG_BEGINS = "# Replay: geffect-fast"
"""The beginning of a file that `dump_config` wrote."""


def load_config(path: str | Path) -> AnyConfig:
    """Read the config in a YAML file, of the kind of run that the file's field `command` names.

    Raises:
        InputError: as in `read_values`, or a field has no valid value.
    """

    values = read_values(path)
    kind: type[AnyConfig] = KINDS.get(str(values.get("command")), ProfileConfig)
    return checked_config(kind, values, str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """Read the unchecked fields of a YAML file, for a caller that overrides some of them.

    Raises:
        InputError: the file is missing, is not YAML, or holds no fields.
    """
    try:
        check_regular(Path(path), f"config {path}")
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"config {path} does not exist; give a YAML file such as run.yaml"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"config {path} cannot be read: {reason}; give a YAML file such as run.yaml"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"config {path} is not UTF-8; save it as UTF-8") from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a date such as 2024-13-01
        raise InputError(
            f"config {path} is unusable YAML ({in_one_line(error, 120)}); mend or replace it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or in_one_line(error)
        raise InputError(f"config {path} is not valid YAML{line}: {problem}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path} must hold fields such as 'model: PATH'")
    return values


def dump_config(config: AnyConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    values = config.model_dump(mode="json")
    replay = f"{CONFIG_BEGINS} {config.command} --config run.yaml --out NEW_FOLDER\n"
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    # Control characters that YAML counts as printable are left; each is in a double-quoted string.
    return replay + visible(text)


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that puts strings with control characters between double quotes, escaped."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if one_line(data) == data else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

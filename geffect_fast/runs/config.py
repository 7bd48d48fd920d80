"""What a run is made from: one frozen, checked description that is written beside its results."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from geffect_fast.data.files import check_regular
from geffect_fast.data.tokenize import CHAT_DATE, checked_date
from geffect_fast.errors import InputError
from geffect_fast.runs.disk import is_there, user_path
from geffect_fast.visible import one_line, visible

CONFIG_BEGINS = "# Replay: geffect-fast"
"""What a file says first that `dump_config` wrote."""


def _settled(source: str) -> str:
    """An existing path made absolute, so that a replay from elsewhere finds it; else unchanged."""
    if not source:
        raise ValueError("must not be empty; give a path or a hub id")
    path = user_path(source)
    try:
        return str(path.absolute()) if is_there(path) else source
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{reason}; give a path or a hub id") from None


Source = Annotated[str, AfterValidator(_settled)]
"""A path (stored absolute) or a hub id (stored as it is)."""


class RunConfig(BaseModel):
    """What every run is made from: models, data, and how effects are measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    command: str
    """The command that replays it."""

    model: Source
    """Folder or hub id of a transformers causal language model."""

    tokenizer: Source | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""

    forget: Source
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`."""

    retain: Source
    """Data to keep, in the same format: the retain risk and retain regularisers read it."""

    probes: dict[Annotated[str, Field(min_length=1)], Source] = {}
    """Further data sets, each a risk of its own under the name given."""

    objectives: tuple[str, ...] = Field(min_length=1)
    """Unlearning objectives, such as `npo(beta=0.1) + 0.5*kl`."""

    refusals: Source | None = None
    """Refusals for po, dpo and altpo, one a line, where rows have no `alternative` of their own."""

    reference: Source | None = None
    """Folder or hub id of the reference model of NPO-like objectives; none: the model itself."""

    reduction: Literal["token", "sample", "sum"] = "token"
    """token: means over all answer tokens; sample: over each sample's, then samples; sum: none."""

    risk: str = "nll"
    """The risk whose change is predicted, an objective: nll, the answers' mean loss."""

    resolve: tuple[str, ...] = ("parameter", "sample")
    """Axes of the result: parameter or group; sample; token (predicted) or position (of use)."""

    groups: dict[Annotated[str, Field(min_length=1)], str] = {}
    """Groups of blocks by name, such as first: 0-3; none: thirds by depth."""

    engine: Literal["auto", "reverse", "forward"] = "auto"
    """reverse (by parameter, position), forward (by token), auto: what resolve needs or is cheaper.
    Both are exact."""

    norms: bool | None = None
    """Whether gradient norms and cosines are computed too; none: with the reverse engine."""

    template: str = "auto"
    """auto (the chat template, else plain Question:/Answer:), or text with {question}, {answer}."""

    max_length: int | None = Field(default=None, gt=0)
    """Longest sequence accepted, in tokens; a longer one is an error that names its row."""

    date: str = CHAT_DATE
    """The day, YYYY-MM-DD, that chat templates are told which ask for it: no number depends on when
    a run is made."""

    rows: dict[str, str] = {}
    """Digests of the tokenised rows by data set; recorded, so that a replay tells other rows."""

    token_budget: int | None = Field(default=None, gt=0)
    """Tokens a batch; none: chosen from free memory, and then recorded."""

    trust_remote_code: bool = False
    """Run Python code that a model's folder or hub id brings along (auto_map), with all your
    rights; without it such models are refused, and nobody is asked."""

    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """float64, float32, bfloat16 or float16; auto: that of the checkpoint."""

    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""

    threads: int | None = Field(default=None, gt=0)
    """CPU threads; none: torch's own choice, and then recorded."""

    @field_validator("objectives", mode="before")
    @classmethod
    def _canonical(cls, value: Any, info: ValidationInfo) -> Any:
        """Canonical strings of a list, or of one string with commas; ranges as written."""
        from geffect_fast.objectives import parse_list
        from geffect_fast.objectives.ranges import expand_list

        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple):
            return value
        listed: list[tuple[Any, str]]
        found: dict[Any, str] = {}
        try:
            if info.data.get("command") == "sweep":
                listed = [(sweep.text, sweep.text) for sweep in expand_list(texts)]
            else:
                listed = [(o, str(o)) for text in texts for o in parse_list(text)]
        except InputError as error:
            raise ValueError(str(error)) from None
        for objective, text in listed:
            if objective in found:
                raise ValueError(f"objective {text} is listed twice; leave one out")
            found[objective] = text
        return tuple(found.values())

    @field_validator("risk")
    @classmethod
    def _parsed_risk(cls, value: str) -> str:
        from geffect_fast.objectives import parse

        try:
            return str(parse(value))
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("resolve")
    @classmethod
    def _known_axes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from geffect_fast.runs.resolution import checked_axes

        try:
            return checked_axes(value)
        except InputError as error:
            raise ValueError(str(error).removeprefix("resolve: ")) from None

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str) -> str:
        try:
            checked_date(value)
        except InputError as error:
            raise ValueError(str(error).removeprefix("date: ")) from None
        return value

    @field_validator("probes")
    @classmethod
    def _free_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in ("unlearn", "retain"):
                raise ValueError(f"probe name {name!r} is taken by a built-in risk; choose another")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        import torch

        if value == "auto":
            return value
        try:
            device = torch.device(value)
        except RuntimeError:
            raise ValueError(f"device {value!r} must be auto, cpu, cuda or cuda:N") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device {value!r} must be auto, cpu, cuda or cuda:N")
        return value


class ProfileConfig(RunConfig):
    """All that decides the numbers of a profile; saved as `run.yaml`, it replays them bitwise."""

    command: Literal["profile", "sweep"] = "profile"
    """The command that replays it; objectives of a sweep may hold ranges."""

    checkpoints: tuple[str, ...] = ()
    """Folders or patterns, such as out/checkpoint-*, of checkpoints to profile in turn; the model
    is then that before training, step 0, or left out."""

    @model_validator(mode="before")
    @classmethod
    def _found_checkpoints(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Patterns become folders, in order; the first of them is the model where none is given."""
        given = values.get("checkpoints")
        if not given or not isinstance(given, list | tuple | str):
            return values
        from geffect_fast.runs.checkpoints import find_checkpoints

        if values.get("command") == "sweep":
            raise ValueError("checkpoints: go with profile, not with sweep; leave them out")
        try:
            found = [str(folder) for folder in find_checkpoints(given).values()]
        except InputError as error:
            raise ValueError(str(error)) from None
        return values | {"model": values.get("model") or found[0], "checkpoints": found}

    @model_validator(mode="before")
    @classmethod
    def _axes_of_a_sweep(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"resolve": ("sample",)} | values if values.get("command") == "sweep" else values


Config = TypeVar("Config", bound=BaseModel)


def make_config(
    values: dict[Any, Any], where: str = "", options: Mapping[str, str] | None = None
) -> ProfileConfig:
    """A profile's or sweep's config from plain values, as `checked_config`."""
    return checked_config(ProfileConfig, values, where, options)


def checked_config(
    kind: type[Config],
    values: dict[Any, Any],
    where: str = "",
    options: Mapping[str, str] | None = None,
) -> Config:
    """A config from plain values.

    Args:
        kind: of what run.
        values: field name to value.
        where: what the error calls the place they come from, such as a file name.
        options: fields that come from options of the command line in its stead, and what these are
            called.

    Raises:
        InputError: one line with the place, the field, what is wrong and the nearest field name.
    """
    for name in values:
        if not isinstance(name, str):
            place = f"{where}: " if where else ""
            raise InputError(f"{place}field {name!r} must be text, such as model or forget")
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(_one_line(error, where, options or {}, list(kind.model_fields))) from None


def load_config(path: str | Path) -> RunConfig:
    """The config in a YAML file, of the kind of run that its field `command` names.

    Raises:
        InputError: as `read_values` and `make_config`.
    """
    from geffect_fast.runs.unlearn_config import UnlearnConfig

    values = read_values(path)
    kind = UnlearnConfig if values.get("command") == "unlearn" else ProfileConfig
    return checked_config(kind, values, str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The unchecked fields of a YAML file, for a caller that overrides some of them.

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
            f"config {path} is unusable YAML ({_flat(error)[:120]}); mend or replace it"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or _flat(error)
        raise InputError(f"config {path} is not valid YAML{line}: {problem}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path} must hold fields such as 'model: PATH'")
    return values


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back to an equal config."""
    values = config.model_dump(mode="json")
    replay = f"{CONFIG_BEGINS} {config.command} --config run.yaml --out NEW_FOLDER\n"
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    # What is left of them YAML counts as printable; it stands between double quotes.
    return replay + visible(text)


class _Dumper(yaml.SafeDumper):
    """Writes names as they are, and those with control characters escaped, between quotes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if one_line(data) == data else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _one_line(
    error: ValidationError, where: str, options: Mapping[str, str], fields: list[str]
) -> str:
    """The first problem of a validation error: place, field, problem, remedy."""
    problem = min(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    if not problem["loc"]:  # of several fields; the message begins with the one to change
        field, _, said = str(problem["ctx"]["error"]).partition(": ")
        place = f"{where}: " if where and field not in options else ""
        return f"{place}{options.get(field, field)}: {said}"
    first, *inner = map(str, problem["loc"])
    place = f"{where}: " if where and first not in options else ""
    field = ".".join([options.get(first, first), *inner])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(field, fields, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields)}"
        return f"{place}unknown field {_short(field)}; {advice}"
    if problem["type"] == "missing":
        return f"{place}field {field!r} is missing; give it"
    if problem["type"] == "value_error":
        return f"{place}{field}: {problem['ctx']['error']}"
    given = problem["input"]
    message = f"{place}{field}: {problem['msg'].replace('Input s', 's')}, got {_short(given)}"
    allowed = re.findall(r"'([^']+)'", str(problem.get("ctx", {}).get("expected")))
    close = difflib.get_close_matches(str(given), allowed, n=1)
    return message + (f"; did you mean {close[0]!r}?" if close else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())

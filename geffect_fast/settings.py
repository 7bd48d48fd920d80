"""Settings: every option of every run, declared, described and checked here, once.

`run.yaml`, the options of commands and the arguments of `geffect_fast.profile` and the like are
made from these fields; a field's docstring is its help everywhere.
"""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from geffect_fast.data.tokenize import CHAT_DATE, checked_date
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, parse, parse_list
from geffect_fast.objectives import resolve as resolve_objective
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.objectives.ranges import expand_list
from geffect_fast.paths import find_checkpoints, is_there, user_path
from geffect_fast.results.resolution import checked_axes

Read = TypeVar("Read")
Function = TypeVar("Function", bound=Callable[..., Any])


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


def _read_by(field: str, read: Callable[[Any], Read]) -> Callable[[Any], Read]:
    """A reader whose errors are those of a field, which names itself."""

    def checked(value: Any) -> Read:
        try:
            return read(value)
        except InputError as error:
            raise ValueError(str(error).removeprefix(f"{field}: ")) from None

    return checked


def _day(date: str) -> str:
    checked_date(date)
    return date


def _groups(groups: Any) -> Any:
    if not isinstance(groups, Mapping | None):
        raise InputError(f"got {groups!r}; give blocks by name, such as {{'first': '0-3'}}")
    return groups or {}


def _canonical(objective: str) -> str:
    return str(parse(objective))


def _risk(spec: str | Objective) -> str | Objective:
    """The canonical string of a risk, or the objective that is given."""
    objective = resolve_objective(spec)
    parts = objective.parts()
    if len(parts) != 1 or parts[0][0] != 1.0 or parts[0][1].needs & REFERENCE_NEEDS:
        raise InputError(
            f"'{objective}' must be one objective that needs no reference, such as nll"
        )
    return str(parts[0][1]) if isinstance(spec, str) else spec


@dataclass(frozen=True)
class Option:
    """How the command line takes a field, where that is not by its name with dashes.

    Attributes:
        names: of the option.
        metavar: what stands for its value.
        help: in place of the field's docstring.
        repeatable: whether the option may be given several times.
    """

    names: tuple[str, ...] = ()
    metavar: str | None = None
    help: str | None = None
    repeatable: bool = False


PathOrId = Annotated[str, AfterValidator(_settled)]
"""A path (stored absolute) or a hub id (stored as it is)."""
Name = Annotated[str, Field(min_length=1)]


class Settings(BaseModel):
    """What all settings share: they are checked when they are made, and never change."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
    )

    def fields(self, kind: type[Settings]) -> dict[str, Any]:
        """Those that `kind` declares, by name, as arguments."""
        return {name: getattr(self, name) for name in kind.model_fields}


class Named(Settings):
    """What a run reads, by path or hub id."""

    command: str
    """The command that replays it."""

    model: Annotated[PathOrId, Option(("--model", "-m"))]
    """Folder or hub id of a transformers causal language model."""

    forget: Annotated[PathOrId, Option(("--forget", "-f"))]
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`."""

    retain: Annotated[PathOrId, Option(("--retain", "-r"))]
    """Data to keep, in the same format: the retain risk and retain regularisers read it."""

    objectives: Annotated[
        tuple[str, ...],
        Option(
            help="Objectives with commas between: 'ga,wga(alpha=1),npo(beta=0.1)+kl'; repeatable.",
            repeatable=True,
        ),
    ] = Field(min_length=1)
    """Unlearning objectives, such as `npo(beta=0.1) + 0.5*kl`."""

    probes: Annotated[
        dict[Name, PathOrId],
        Option(("--probe",), "NAME=DATA", "A further risk on data of its own; repeatable."),
    ] = {}
    """Further data sets, each a risk of its own under the name given."""

    refusals: PathOrId | None = None
    """Refusals for po, dpo and altpo, one a line, where rows have no `alternative` of their own."""

    reference: PathOrId | None = None
    """Folder or hub id of the reference model of NPO-like objectives; none: the model itself."""

    tokenizer: PathOrId | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""

    rows: dict[str, str] = {}
    """Digests of the tokenised rows by data set; recorded, so that a replay tells other rows."""

    @field_validator("objectives", mode="before")
    @classmethod
    def _canonical_once(cls, value: Any, info: ValidationInfo) -> Any:
        """Canonical strings of a list, or of one string with commas; ranges as written."""
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

    @field_validator("probes")
    @classmethod
    def _free_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in ("unlearn", "retain"):
                raise ValueError(f"probe name {name!r} is taken by a built-in risk; choose another")
        return value


class Reading(Settings):
    """How rows become tokens, and tokens batches."""

    template: str = "auto"
    """auto (the chat template, else plain Question:/Answer:), or text with {question}, {answer}."""

    max_length: int | None = Field(default=None, gt=0)
    """Longest sequence accepted, in tokens; a longer one is an error that names its row."""

    date: Annotated[str, AfterValidator(_read_by("date", _day)), Option(metavar="YYYY-MM-DD")] = (
        CHAT_DATE
    )
    """The day, YYYY-MM-DD, that chat templates are told which ask for it: no number depends on when
    a run is made."""

    token_budget: int | None = Field(default=None, gt=0)
    """Tokens a batch; none: chosen from free memory, and then recorded. Where memory runs out, it
    is halved, with a warning."""

    trust_remote_code: bool = False
    """Run Python code that a model's folder or hub id brings along (auto_map), with all your
    rights; without it such models are refused, and nobody is asked."""


class Measuring(Reading):
    """What is measured, and how."""

    reduction: Literal["token", "sample", "sum"] = "token"
    """What means are taken over, in objectives and risks alike: token, all answer tokens; sample,
    each sample's tokens and then samples; sum, no mean."""

    risk: Annotated[Any, BeforeValidator(_read_by("risk", _risk))] = "nll"
    """An objective used as the risk; its part on any data set is the risk on that set. nll is the
    mean loss of the answers."""

    resolve: Annotated[tuple[str, ...], BeforeValidator(_read_by("resolve", checked_axes))] = (
        "parameter",
        "sample",
    )
    """Axes of the result; all others are summed: parameter, or group (embedding, thirds of the
    blocks by depth, final norm, output layer); sample; and within samples token, which predicted
    token drives an effect, or position, where in the sequence a layer is used."""

    groups: Annotated[
        dict[Name, Any],
        BeforeValidator(_read_by("groups", _groups)),
        Option(
            ("--group",),
            "NAME=BLOCKS",
            "A group of blocks in place of thirds, such as first=0-3; repeatable.",
        ),
    ] = {}
    """Groups of blocks by name, such as first: 0-3, in place of thirds by depth."""

    engine: Literal["auto", "reverse", "forward"] = "auto"
    """reverse resolves by parameter and position; forward by token, and any number of objectives
    costs the same; auto takes what resolve needs, or else costs less, and says why. Both are
    exact."""

    norms: bool | None = None
    """Whether gradient norms and cosines are computed too, and the samples' shares compared with
    whole gradients; none: with the reverse engine, as the forward engine forms no gradient of an
    objective."""

    @property
    def risk_objective(self) -> Objective:
        """The risk, parsed."""
        return resolve_objective(self.risk).parts()[0][1]


class Machine(Settings):
    """Where a run is made, and in what precision."""

    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """float64, float32, bfloat16 or float16; auto: that of the checkpoint."""

    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""

    threads: int | None = Field(default=None, gt=0)
    """CPU threads; none: torch's own choice, and then recorded."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        try:
            known = value == "auto" or torch.device(value).type in ("cpu", "cuda")
        except RuntimeError:
            known = False
        if not known:
            raise ValueError(f"device {value!r} must be auto, cpu, cuda or cuda:N")
        return value


class RunConfig(Machine, Measuring, Named):
    """What every run is made from: models, data, and how effects are measured."""

    @property
    def measured(self) -> tuple[str, ...]:
        """All objectives."""
        return self.objectives


class ProfileConfig(RunConfig):
    """All that decides the numbers of a profile; saved as `run.yaml`, it replays them bitwise."""

    command: Literal["profile", "sweep"] = "profile"
    """The command that replays it; objectives of a sweep may hold ranges."""

    checkpoints: Annotated[tuple[str, ...], Option(metavar="PATTERN", repeatable=True)] = ()
    """Folders or patterns, such as out/checkpoint-*, of checkpoints to profile in turn; the model
    is then that before training, step 0, or left out."""

    @model_validator(mode="before")
    @classmethod
    def _found_checkpoints(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Patterns become folders, in order; the first of them is the model where none is given."""
        given = values.get("checkpoints")
        if not given or not isinstance(given, list | tuple | str):
            return values
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


class Training(Settings):
    """How a model is trained, and how often it is probed on the way."""

    steps: int = Field(gt=0)
    """Updates of the optimizer."""

    probe_every: int = Field(default=1, gt=0)
    """Updates between two probes; the first is before training, the last at its end."""

    probe_rows: Annotated[int | Literal["all"] | None, Option(metavar="N|all")] = None
    """Rows of each data set that a probe measures, evenly chosen: a number, or all; none: so many
    that a probe costs at most one training step, and then recorded."""

    batch_size: int | None = Field(default=None, gt=0)
    """Forget rows a batch; none: 32, or the whole set where it is smaller."""

    retain_batch_size: int | None = Field(default=None, gt=0)
    """Retain rows drawn beside a batch, where the objective reads them; none: as many."""

    accumulation: int = Field(default=1, gt=0)
    """Batches whose gradients are added up for one update, exactly as of one larger batch."""

    learning_rate: Annotated[float, Option(("--learning-rate", "--lr"))] = Field(
        default=1e-5, ge=0, allow_inf_nan=False
    )
    """Learning rate, at its peak where a scheduler changes it."""

    scheduler: str = "constant"
    """Learning rate scheduler of transformers: constant, linear, cosine ..."""

    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises from 0; for schedulers that warm up."""

    optimizer: str = "adamw_torch"
    """Optimizer of transformers: adamw_torch, sgd, adafactor ..."""

    precision: Literal["model", "bf16", "fp16"] = "model"
    """Autocast in training: bf16, or on a GPU fp16; model: none, as the weights are."""

    checkpointing: bool = False
    """Gradient checkpointing: activations are computed again in the backward, to save memory."""

    lora_rank: int | None = Field(default=None, gt=0)
    """Train an adapter of this rank in place of the weights (LoRA, needs peft)."""

    lora_alpha: int | None = Field(default=None, gt=0)
    """Scale of the adapter, divided by its rank; none: twice the rank."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter, in training."""

    lora_targets: tuple[str, ...] = ()
    """Names of the modules to adapt, such as q_proj; none: every linear layer but the output."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the order of the data, dropout and an adapter's first weights."""

    trainer: Annotated[
        dict[str, Any],
        Option(
            metavar="FIELD=VALUE",
            help="A field of transformers' TrainingArguments, such as weight_decay=0.01, or "
            "max_grad_norm=1, without which gradients are not clipped; repeatable.",
        ),
    ] = {}
    """Further fields of transformers' TrainingArguments, of the optimizer, the schedule and
    logging, such as weight_decay: 0.01; gradients are clipped only with max_grad_norm."""

    save_every: int | None = Field(default=None, gt=0)
    """Updates between two checkpoints to resume from; none: at every probe."""

    keep_checkpoints: bool = False
    """Whether all checkpoints stay; else each goes when the next, or the run, is complete."""

    @field_validator("probe_rows", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        """A number written as text, as options are."""
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        whole = isinstance(number, int) and not isinstance(number, bool) and number > 0
        if number in (None, "all") or whole:
            return number
        raise ValueError(f"must be a whole number of at least 1, or all, got {value!r}")

    @field_validator("trainer")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Numbers written like 1e-3, which YAML takes for text."""

        def number(given: Any) -> Any:
            try:
                return float(given) if isinstance(given, str) else given
            except ValueError:
                return given

        return {name: number(given) for name, given in value.items()}

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.probe_every > self.steps:
            raise ValueError(
                f"probe_every: {self.probe_every} is more than the {self.steps} steps; give at "
                "most as many"
            )
        every = self.save_every
        if every is not None and every % self.probe_every:
            raise ValueError(
                f"save_every: {every} is no multiple of probe_every, {self.probe_every}; give one, "
                "so that a resumed run knows the probe before it"
            )
        if self.lora_rank is None and (self.lora_alpha or self.lora_dropout or self.lora_targets):
            raise ValueError("lora_rank: is missing; give it, or none of the other LoRA fields")
        return self


class UnlearnSettings(Training, Measuring):
    """How a model is trained, and what a probe measures, and how."""


class UnlearnConfig(UnlearnSettings, RunConfig):
    """All that decides the numbers of an unlearning run; saved as `run.yaml`, it replays them."""

    command: Literal["unlearn"] = "unlearn"
    """The command that replays it."""

    objective: Annotated[str, AfterValidator(_read_by("objective", _canonical))]
    """The unlearning objective to train on, such as `npo(beta=0.1) + 1.0*kl`."""

    objectives: Annotated[tuple[str, ...], Option(repeatable=True)] = ()
    """Further objectives, measured beside the one trained on; with commas between."""

    @property
    def measured(self) -> tuple[str, ...]:
        """All objectives, the one trained on first."""
        return (self.objective, *self.objectives)

    @model_validator(mode="after")
    def _once(self) -> UnlearnConfig:
        for text in self.objectives:
            if parse(text) == parse(self.objective):
                raise ValueError(f"objectives: '{text}' is trained on, and measured; leave it out")
        return self


Kind = TypeVar("Kind", bound=Settings)


def make_config(
    values: dict[Any, Any], where: str = "", options: Mapping[str, str] | None = None
) -> ProfileConfig:
    """A profile's or sweep's config from plain values, as `checked_config`."""
    return checked_config(ProfileConfig, values, where, options)


def checked_config(
    kind: type[Kind],
    values: dict[Any, Any],
    where: str = "",
    options: Mapping[str, str] | None = None,
) -> Kind:
    """Settings from plain values.

    Args:
        kind: which settings.
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


def takes(kind: type[Settings], **defaults: Any) -> Callable[[Function], Function]:
    """Show the fields of `kind` in the signature and the docstring of a function.

    The function takes them as `**settings`, as they are given, and its docstring has a line
    `settings:` among its arguments.

    Args:
        kind: which settings.
        defaults: where the function's differ from the fields'.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        shown, described = [], []
        for parameter in signature.parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                shown.append(parameter)
        for name, field in kind.model_fields.items():
            default = inspect.Parameter.empty if field.is_required() else field.get_default()
            keyword = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, default)
            )
            shown.append(keyword)
            described.append(
                textwrap.fill(
                    f"{name}: {' '.join((field.description or '').split())}",
                    100,
                    initial_indent=8 * " ",
                    subsequent_indent=12 * " ",
                )
            )
        vars(function)["__signature__"] = signature.replace(parameters=shown)
        text = function.__doc__ or ""
        if f"{8 * ' '}settings:\n" not in text:
            raise ValueError(f"{function.__name__}: its docstring has no line 'settings:'")
        function.__doc__ = text.replace(f"{8 * ' '}settings:", "\n".join(described))
        return function

    return decorate


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
    if problem["type"] == "literal_error" and isinstance(given, str):
        allowed = re.findall(r"'([^']+)'", str(problem["ctx"]["expected"]))
        close = difflib.get_close_matches(given, allowed, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(allowed)}"
        return f"{place}{field}: unknown {_short(given)}; {advice}"
    return f"{place}{field}: {problem['msg'].replace('Input s', 's')}, got {_short(given)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

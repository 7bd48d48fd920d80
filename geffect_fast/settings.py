"""Settings that runs share, with the description and the check of every option.

`run.yaml`, the options of commands and the arguments of functions such as `geffect_fast.profile`
are made from these fields. A field's docstring is its help everywhere.
"""

from __future__ import annotations

from inspect import get_annotations
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from geffect_fast.data.chat_template import CHAT_DATE
from geffect_fast.errors import InputError
from geffect_fast.paths import find_checkpoints
from geffect_fast.setting_types import (
    Name,
    Option,
    PathOrId,
    axes,
    blocks_by_name,
    canonical_list,
    canonical_or_none,
    day,
    number_or_all,
    one_or_several,
    read_by,
    risk_of,
    state_file,
    swept_list,
)

if TYPE_CHECKING:
    from geffect_fast.objectives import Objective


class Settings(BaseModel):
    """The base class of settings, which are checked when they are made and never change.

    Class attributes:
        panel: the heading under which help shows the options that the class itself declares.
    """

    panel: ClassVar[str]

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        defer_build=True,  # options need the fields alone
    )

    @classmethod
    def panel_of(cls, name: str) -> str:
        """The heading of a field's option: the panel of the class that declares the field."""
        return next(kind.panel for kind in cls.__mro__ if name in get_annotations(kind))  # type: ignore[attr-defined]

    def fields(self, kind: type[Settings]) -> dict[str, Any]:
        """The values of the fields that `kind` has, by name."""
        return {name: getattr(self, name) for name in kind.model_fields}


class RunInputs(Settings):
    """The inputs of a run, by path or hub id: models, data sets and objectives."""

    panel = "Models and data"

    command: str
    """The command that replays the run."""

    model: Annotated[PathOrId, Option(("--model", "-m"))]
    """Folder or hub id of a transformers causal language model."""

    forget: Annotated[PathOrId, Option(("--forget", "-f"))]
    """Data to forget: a file (JSON, JSON lines, CSV, Parquet, text), a folder of datasets, or a hub
    id `name:config:split`."""

    retain: Annotated[PathOrId, Option(("--retain", "-r"))]
    """Data to keep, in the same format; the retain risk and retain regularisers read it."""

    objectives: Annotated[
        tuple[str, ...],
        Option(
            ("--objectives", "--objective"),
            "OBJECTIVE...",
            "Objectives with spaces or commas between: ga 'wga(alpha=1)' 'npo(beta=0.1) + kl'; in "
            "sweep with ranges, 'wga(alpha=0.1:7:30)' 'npo(beta=0.01:4:30,log)'.",
            repeatable=True,
        ),
    ] = Field(min_length=1)
    """Unlearning objectives, such as `npo(beta=0.1) + 0.5*kl`."""

    probes: Annotated[
        dict[Name, PathOrId],
        Option(("--probe",), "NAME=DATA", "A further risk on data of its own; repeatable."),
    ] = {}
    """Further data sets by name; each is a risk of its own."""

    refusals: PathOrId | None = None
    """Refusals for po, dpo and altpo, one a line, for rows without a field `alternative`."""

    reference: PathOrId | None = None
    """Folder or hub id of the reference model of NPO-like objectives; none: the model itself."""

    tokenizer: PathOrId | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""

    rows: dict[str, str] = {}
    """Digests of the tokenised rows by data set; recorded, so that a replay notices other rows."""

    @field_validator("objectives", mode="before")
    @classmethod
    def _canonical_once(cls, value: Any, info: ValidationInfo) -> Any:
        """Canonical strings of a list, or of one string with commas; ranges as written."""
        if not isinstance(value, str | list | tuple):
            return value
        read = swept_list if info.data.get("command") == "sweep" else canonical_list
        return read_by("objectives", read)(value)

    @field_validator("probes")
    @classmethod
    def _free_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in ("unlearn", "retain"):
                raise ValueError(f"probe name {name!r} is taken by a built-in risk; choose another")
        return value


class Reading(Settings):
    """Settings of reading: from rows to tokens, and from tokens to batches."""

    panel = "Reading"

    template: str = "auto"
    """auto: the chat template, else plain Question:/Answer:; or text with {question}, {answer}."""

    data_format: Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "text"] = "auto"
    """Format of the data files, gzips or not: json (one document), jsonl, csv, tsv, parquet or
    text; auto: found by their content."""

    max_length: int | None = Field(default=None, gt=0)
    """Most tokens of a sequence; a longer one is an error that names its row. Plain text is cut
    into windows of this length; none: of 2,048 tokens, or the model's positions where these are
    fewer."""

    date: Annotated[str, AfterValidator(read_by("date", day)), Option(metavar="YYYY-MM-DD")] = (
        CHAT_DATE
    )
    """The day, YYYY-MM-DD, that is told to chat templates that ask for it, so that no number
    depends on the day of a run."""

    token_budget: int | None = Field(default=None, gt=0)
    """Most tokens of a batch; none: chosen from free memory, and recorded. Where memory runs out,
    the budget is halved, with a warning."""

    trust_remote_code: bool = False
    """Run Python code that a model's folder or hub id brings along (auto_map), with all your
    rights; otherwise such models are refused, without a question."""


class Measuring(Reading):
    """Settings of measuring effects: risk, axes and engine."""

    panel = "Effects"

    reduction: Literal["token", "sample", "sum"] = "token"
    """How objectives and risks are averaged. token: over all answer tokens; sample: over the tokens
    of each sample and then over the samples; sum: not at all."""

    risk: Annotated[Any, BeforeValidator(read_by("risk", risk_of))] = "nll"
    """The objective that is the risk on every data set; nll is the mean loss of the answers."""

    resolve: Annotated[tuple[str, ...], BeforeValidator(read_by("resolve", axes))] = (
        "parameter",
        "sample",
    )
    """Axes of the result; effects are summed over the others. parameter, or group (embedding,
    thirds of the blocks by depth, final norm, output layer); sample; and within samples token (the
    predicted token that drives an effect) or position (the place in the sequence where a layer is
    used)."""

    groups: Annotated[
        dict[Name, Any],
        BeforeValidator(read_by("groups", blocks_by_name)),
        Option(
            ("--group",),
            "NAME=BLOCKS",
            "A group of blocks in place of thirds, such as first=0-3; repeatable.",
        ),
    ] = {}
    """Groups of blocks by name, such as first: 0-3, in place of thirds by depth."""

    engine: Literal["auto", "reverse", "forward"] = "auto"
    """reverse resolves by parameter and position; forward resolves by token, at the same cost for
    any number of objectives; auto takes the engine that resolve needs, or else the cheaper one, and
    says why. Both are exact."""

    norms: bool | None = None
    """Also compute gradient norms and cosines, and compare the samples' shares with whole
    gradients; none: only with the reverse engine, since the forward engine forms no gradient of an
    objective."""

    @property
    def risk_objective(self) -> Objective:
        """The risk, parsed."""
        from geffect_fast.objectives import resolve

        return resolve(self.risk).parts()[0][1]


class Machine(Settings):
    """The device, the threads and the precision of a run."""

    panel = "Machine"

    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """float64, float32, bfloat16 or float16; auto: that of the checkpoint."""

    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: cuda where there is one."""

    threads: int | None = Field(default=None, gt=0)
    """CPU threads; none: torch's own choice, which is recorded."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        import torch

        try:
            known = value == "auto" or torch.device(value).type in ("cpu", "cuda")
        except RuntimeError:
            known = False
        if not known:
            raise ValueError(f"device {value!r} must be auto, cpu, cuda or cuda:N")
        return value


class RunConfig(Machine, Measuring, RunInputs):
    """The settings that all runs of effects share: models, data, measuring and machine."""

    @property
    def measured(self) -> tuple[str, ...]:
        """All objectives."""
        return self.objectives


class SecondOrder(Settings):
    """The setting of predictions to second order."""

    panel = "Effects"

    second_order: bool = False
    """Also compute the curvature of the risks along each objective's step, which tells how long a
    step may be: predictions are then -lr e + lr^2/2 u^T H u. For weights in fp32 or fp64."""


class Sharding(Settings):
    """The part of a model that each rank holds, where several ranks measure it together."""

    panel = "Machine"

    shard: Literal["auto", "none", "fsdp", "hsdp"] = "auto"
    """Part of the model that each rank of torchrun holds. none: the whole model; fsdp: a part of
    the model, of gradients and of an optimizer's state, of which all ranks together have one copy;
    hsdp: the same, with one copy for each host; auto: none where everything fits, else fsdp."""


class ProfileConfig(Sharding, SecondOrder, RunConfig):
    """The settings that determine a profile; a replay of `run.yaml` is bitwise the same."""

    panel = "Checkpoints and steps"

    command: Literal["profile", "sweep"] = "profile"
    """The command that replays the run; objectives of a sweep may hold ranges."""

    checkpoints: Annotated[tuple[str, ...], Option(metavar="PATTERN", repeatable=True)] = ()
    """Folders of checkpoints to profile in turn, or patterns such as out/checkpoint-*; the model is
    then the one before training, step 0, or is left out."""

    metric: Literal["sgd", "adam", "adamw", "lion"] | None = None
    """Measure the effects of the step that this optimizer takes, <grad R, P grad L>, in place of
    the effects of the plain gradient; checkpoints bring their own optimizers."""

    conflicts: bool = False
    """Also compute the share of each objective's gradient, by size and part of the model, whose
    sign opposes that of the retain risk's gradient; with the axis position also at every token."""

    optimizer_state: Annotated[
        PathOrId | None, Option(metavar="FILE"), AfterValidator(state_file)
    ] = None
    """The optimizer.pt of a Trainer's checkpoint, or the checkpoint's folder, from which the metric
    is made; none: the state of a first step."""

    step_of: Annotated[
        str | None,
        AfterValidator(read_by("step_of", canonical_or_none)),
        Option(metavar="OBJECTIVE"),
    ] = None
    """The objective whose optimizer step is taken; none: the only objective, or of several the mean
    of their squared gradients."""

    @model_validator(mode="before")
    @classmethod
    def _found_checkpoints(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Replace patterns by folders, in order; the first is the model where none is given."""
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

    @model_validator(mode="after")
    def _of_a_step(self) -> ProfileConfig:
        if self.metric is not None and self.checkpoints:
            raise ValueError("metric: checkpoints bring their own optimizers; leave it out")
        if self.metric is not None and self.command == "sweep":
            raise ValueError("metric: goes with profile, not with sweep; leave it out")
        if self.conflicts and (self.command == "sweep" or self.checkpoints):
            raise ValueError("conflicts: goes with a profile of one model; leave it out")
        if self.second_order and self.command == "sweep":
            raise ValueError("second_order: goes with profile, not with sweep; leave it out")
        if self.optimizer_state is not None and self.metric is None:
            raise ValueError("optimizer_state: goes with metric, such as adamw; give that too")
        if self.step_of is not None and self.metric is None:
            raise ValueError("step_of: goes with metric; leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _axes_of_a_sweep(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"resolve": ("sample",)} | values if values.get("command") == "sweep" else values


def as_text(metrics: tuple[Any, ...]) -> tuple[str, ...]:
    """Metrics as texts, as `run.yaml` keeps them."""
    return tuple(map(str, metrics))


class Metrics(Settings):
    """The metrics to measure."""

    panel = "Metrics"

    metrics: Annotated[
        tuple[Any, ...],
        Option(
            metavar="NAMES",
            help="Metrics with commas between: 'probability,min_k(k=0.2)'; repeatable.",
            repeatable=True,
        ),
    ] = ()
    """Metrics by name, such as `probability` or `min_k(k=0.2)`; without metrics and a suite:
    probability, extraction_strength and exact_memorisation."""

    suite: str | None = None
    """The metrics of a benchmark: tofu, muse or survey; `metrics` are measured in addition."""

    max_new_tokens: int = Field(default=200, gt=0)
    """Most tokens that a model writes after a prompt, for metrics that have no length of their
    own."""

    _several = field_validator("metrics", mode="before")(one_or_several)


class LiveMetrics(Metrics):
    """The metrics to measure during a training, and the steps at which they are measured."""

    evaluate_every: int | None = Field(default=None, gt=0)
    """Updates between two measurements of metrics, a multiple of the updates between two probes;
    the first is before training, the last at its end. None: at every probe where metrics or a suite
    are named, else never."""

    evaluate_rows: Annotated[int | Literal["all"], Option(metavar="N|all")] = "all"
    """Rows of each data set that metrics are measured on, evenly chosen: a number, or all."""

    _count = field_validator("evaluate_rows", mode="before")(number_or_all)

    @property
    def evaluates(self) -> bool:
        """Whether any metric is measured."""
        return bool(self.metrics or self.suite or self.evaluate_every)

    def check_every(self, probe_every: int, field: str = "probe_every") -> None:
        """Raise `ValueError` where metrics would be measured beside no probe.

        Args:
            probe_every: updates between two probes.
            field: name of the field that gives `probe_every`.
        """
        every = self.evaluate_every
        if every is not None and every % probe_every:
            raise ValueError(
                f"evaluate_every: {every} is no multiple of {field}, {probe_every}; give one, so "
                "that measures stand beside effects"
            )
        if self.evaluate_rows != "all" and not self.evaluates:
            raise ValueError(
                "evaluate_rows: no metric is measured; name metrics, or give evaluate_every"
            )

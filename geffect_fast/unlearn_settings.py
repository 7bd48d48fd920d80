"""Settings of `unlearn`: a training with probes and measures on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from geffect_fast.setting_types import (
    Option,
    PathOrId,
    canonical,
    canonical_update,
    number_or_all,
    read_by,
    texts_of,
)
from geffect_fast.settings import (
    LiveMetrics,
    Measuring,
    RunConfig,
    SecondOrder,
    Sharding,
    as_text,
)


def _reporters(given: Any) -> Any:
    """Names of reporters, from a list or a text with commas; the name `none` is left out."""
    names = texts_of(given)
    return tuple(n for n in names if n != "none") if isinstance(names, tuple) else names


class Training(SecondOrder):
    """Settings of the training, and of its probes."""

    panel = "Training"

    steps: int = Field(gt=0)
    """Updates of the optimizer."""

    probe_every: int = Field(default=1, gt=0)
    """Updates between two probes; the first is before training, the last at its end."""

    probe_rows: Annotated[int | Literal["all"] | None, Option(metavar="N|all")] = None
    """Rows of each data set that a probe measures, evenly chosen: a number, or all; none: as many
    as make a probe cost at most one training step, which is recorded."""

    batch_size: int | None = Field(default=None, gt=0)
    """Forget rows of a batch; none: 32, or all rows where there are fewer."""

    retain_batch_size: int | None = Field(default=None, gt=0)
    """Retain rows drawn for each batch, where the objective reads them; none: as many as forget
    rows."""

    accumulation: int = Field(default=1, gt=0)
    """Batches whose gradients are added up for one update, which is exactly one larger batch."""

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

    update: Annotated[str, BeforeValidator(read_by("update", canonical_update))] = "sgd"
    """Rule that changes gradients before the optimizer steps: sgd (no change), orthograd, gru, gu,
    blur, pcgrad, sago or sam, with parameters such as 'gru(gamma=0.8)'."""

    precision: Literal["model", "bf16", "fp16"] = "model"
    """Autocast in training: bf16, or on a GPU fp16; model: no autocast, in the weights'
    precision."""

    checkpointing: bool = False
    """Gradient checkpointing: compute activations again in the backward, to save memory."""

    lora_rank: int | None = Field(default=None, gt=0)
    """Train an adapter of this rank in place of the weights (LoRA, needs peft)."""

    lora_alpha: int | None = Field(default=None, gt=0)
    """Scale of the adapter, divided by its rank; none: twice the rank."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter, in training."""

    lora_targets: tuple[str, ...] = ()
    """Names of the modules to adapt, such as q_proj; none: every linear layer but the output."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the order of the data, of dropout and of an adapter's first weights."""

    trainer: Annotated[
        dict[str, Any],
        Option(
            metavar="FIELD=VALUE",
            help="A field of transformers' TrainingArguments, such as weight_decay=0.01 or "
            "max_grad_norm=1 (gradients are not clipped by default); repeatable.",
        ),
    ] = Field(default_factory=dict)
    """Further fields of transformers' TrainingArguments, of the optimizer, the schedule and
    logging, such as weight_decay: 0.01; gradients are clipped only with max_grad_norm."""

    report_to: Annotated[
        tuple[str, ...],
        BeforeValidator(_reporters),
        Option(
            metavar="NAMES",
            help="Reporters of transformers that get every probe as it is measured: tensorboard "
            "(events in logs of --out), wandb, mlflow ...; with commas between, repeatable. They "
            "get geffect/e_u, geffect/e_r, geffect/collateral, geffect/risk_unlearn, "
            "geffect/risk_retain; for objectives that are not trained on, with /OBJECTIVE behind.",
            repeatable=True,
        ),
    ] = ()
    """Reporters of transformers that get every probe: tensorboard (events in the run's logs/),
    wandb, mlflow ...; none: no reporter."""

    save_every: int | None = Field(default=None, gt=0)
    """Updates between two checkpoints to resume from; none: at every probe."""

    keep_checkpoints: bool = False
    """Keep all checkpoints; otherwise each is removed when the next one, or the run, is
    complete."""

    _rows = field_validator("probe_rows", mode="before")(number_or_all)

    @model_validator(mode="before")
    @classmethod
    def _of_trainer(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Move reporters that are given as a field of TrainingArguments to `report_to`."""
        trainer = values.get("trainer")
        if not isinstance(trainer, dict) or "report_to" not in trainer or values.get("report_to"):
            return values
        others = {name: value for name, value in trainer.items() if name != "report_to"}
        return values | {"trainer": others, "report_to": trainer["report_to"] or ()}

    @field_validator("trainer")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Turn numbers such as 1e-3, which YAML takes for text, into floats."""

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


class UnlearnSettings(Training, LiveMetrics, Measuring):
    """Settings of the training, of the effects that a probe measures, and of the metrics."""

    @model_validator(mode="after")
    def _beside_probes(self) -> UnlearnSettings:
        if (self.evaluate_every or 0) > self.steps:
            raise ValueError(
                f"evaluate_every: {self.evaluate_every} is more than the {self.steps} steps; give "
                "at most as many"
            )
        self.check_every(self.probe_every)
        return self


class UnlearnConfig(Sharding, UnlearnSettings, RunConfig):
    """The settings that determine an unlearning run; `run.yaml` keeps them for a replay."""

    panel = "Models and data"

    command: Literal["unlearn"] = "unlearn"
    """The command that replays the run."""

    objective: Annotated[str, AfterValidator(read_by("objective", canonical))]
    """The unlearning objective to train on, such as `npo(beta=0.1) + 1.0*kl`."""

    objectives: Annotated[tuple[str, ...], Option(metavar="OBJECTIVE...", repeatable=True)] = ()
    """Further objectives to measure, with spaces or commas between."""

    holdout: PathOrId | None = None
    """Data that no model was trained on, like the forget data, for membership to compare with."""

    retain_model: PathOrId | None = None
    """Folder or hub id of a model trained without the forget data, or TOFU's saved evaluation log
    of one (a .json file); forget_quality and privleak compare with it."""

    _written = field_validator("metrics")(as_text)

    @model_validator(mode="after")
    def _read_by_metrics(self) -> UnlearnConfig:
        for field in ("holdout", "retain_model"):
            if getattr(self, field) is not None and not self.evaluates:
                raise ValueError(
                    f"{field}: no metric is measured that could read it; name metrics, or give "
                    "evaluate_every"
                )
        return self

    @property
    def measured(self) -> tuple[str, ...]:
        """All objectives, the one trained on first."""
        return (self.objective, *self.objectives)

    @model_validator(mode="after")
    def _once(self) -> UnlearnConfig:
        from geffect_fast.objectives import parse

        for text in self.objectives:
            if parse(text) == parse(self.objective):
                raise ValueError(
                    f"objectives: '{text}' is the objective to train on, and is measured anyway; "
                    "leave it out"
                )
        return self

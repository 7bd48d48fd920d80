"""What an unlearning run is made from: the run's fields, and those of training."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from geffect_fast.errors import InputError
from geffect_fast.runs.config import RunConfig


class Training(BaseModel):
    """How a model is trained, and how often it is probed on the way."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(gt=0)
    """Updates of the optimizer."""

    probe_every: int = Field(default=1, gt=0)
    """Updates between two probes; the first is before training, the last at its end."""

    probe_rows: int | Literal["all"] | None = Field(default=None)
    """Rows of each data set that a probe measures, evenly chosen: a number, or all; none: so many
    that a probe costs at most one training step, and then recorded."""

    batch_size: int | None = Field(default=None, gt=0)
    """Forget rows a batch; none: 32, or the whole set where it is smaller."""

    retain_batch_size: int | None = Field(default=None, gt=0)
    """Retain rows drawn beside a batch, where the objective reads them; none: as many."""

    accumulation: int = Field(default=1, gt=0)
    """Batches whose gradients are added up for one update, exactly as of one larger batch."""

    learning_rate: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
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

    trainer: dict[str, Any] = Field(default={})
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


class UnlearnConfig(Training, RunConfig):
    """All that decides the numbers of an unlearning run; saved as `run.yaml`, it replays them."""

    command: Literal["unlearn"] = "unlearn"
    """The command that replays it."""

    objective: str
    """The unlearning objective to train on, such as `npo(beta=0.1) + 1.0*kl`."""

    objectives: tuple[str, ...] = ()
    """Further objectives, measured beside the one trained on."""

    @field_validator("objective")
    @classmethod
    def _one_objective(cls, value: str) -> str:
        from geffect_fast.objectives import parse

        try:
            return str(parse(value))
        except InputError as error:
            raise ValueError(str(error)) from None

    def training(self) -> Training:
        """The fields of training alone."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})

    @model_validator(mode="after")
    def _once(self) -> UnlearnConfig:
        from geffect_fast.objectives import parse

        for text in self.objectives:
            if parse(text) == parse(self.objective):
                raise ValueError(f"objectives: '{text}' is trained on, and measured; leave it out")
        return self


def trainer_value(text: str) -> Any:
    """What an option's text stands for: a number, true, false, null, a list, or the text itself."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text

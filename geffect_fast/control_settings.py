"""Settings of `control`: the retention to keep, and the measures of a model that keeps it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from geffect_fast.evaluation_settings import Compared, Evaluating
from geffect_fast.paths import short_names
from geffect_fast.setting_types import Option, PathOrId
from geffect_fast.settings import Machine, Sharding, as_text


class Controlling(Evaluating):
    """The retention to keep, the precision of the share that keeps it, and the measures there."""

    panel = "Control"

    metric: str = "extraction_strength"
    """The metric of the retain data that is to be kept, between 0 and 1 with 1 for all;
    model_utility is that of the retain data and its probes together."""

    tau: float = Field(default=0.95, gt=0, le=1)
    """The part of the original's retention that is kept at least."""

    tolerance: float = Field(default=0.01, gt=0, lt=1, allow_inf_nan=False)
    """How close to the largest share that keeps it the share is that is found."""

    grid: int = Field(default=10, gt=0)
    """Equal steps from the original to the unlearned model at which retention is measured first."""


class ControlConfig(Sharding, Machine, Controlling, Compared):
    """The settings that determine the numbers of a control; `run.yaml` keeps them for a replay."""

    panel = "Models and data"

    command: Literal["control"] = "control"
    """The command that replays it."""

    original: PathOrId
    """Folder or hub id of the model before unlearning."""

    unlearned: Annotated[
        tuple[PathOrId, ...],
        Option(
            ("--unlearned", "-u"),
            "MODEL",
            "Folder or hub id of an unlearned model, or of its adapter; several may follow.",
            repeatable=True,
        ),
    ] = Field(min_length=1)
    """Folders or hub ids of unlearned models, or of their adapters, each controlled in turn."""

    forget: Annotated[PathOrId | None, Option(("--forget", "-f"))] = None
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`;
    measured where each unlearned model keeps the same of the retain data."""

    retain: Annotated[PathOrId, Option(("--retain", "-r"))]
    """Data to keep, in the same format: retention is measured there."""

    _written = field_validator("metrics")(as_text)

    @field_validator("unlearned", mode="before")
    @classmethod
    def _several_models(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _once(self) -> ControlConfig:
        for i, model in enumerate(self.unlearned):
            if model in self.unlearned[:i]:
                raise ValueError(f"unlearned: {model} is listed twice; leave one out")
        return self

    def methods(self) -> dict[str, str]:
        """The unlearned models by their names in the result."""
        return short_names(self.unlearned)

    def inputs(self) -> dict[str, str]:
        """Paths and hub ids that are read, by the option that names each."""
        named = {
            "--original": self.original,
            **{f"--unlearned {model}": model for model in self.unlearned},
            "--forget": self.forget,
            "--retain": self.retain,
            **self.compared_inputs(),
        }
        return {option: source for option, source in named.items() if source is not None}

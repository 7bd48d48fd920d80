"""Settings of `control`: the retention to keep, and the measures of a model that keeps it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from geffect_fast.evaluation_settings import Evaluating, EvaluationInputs
from geffect_fast.paths import short_names
from geffect_fast.registry import each_once
from geffect_fast.setting_types import Option, PathOrId, one_or_several
from geffect_fast.settings import Machine, Sharding, as_text


class Controlling(Evaluating):
    """The retention to keep, the precision of the share that keeps it, and the measures there."""

    panel = "Control"

    metric: str = "extraction_strength"
    """Metric of the retain data to keep, from 0 to 1 (all kept); model_utility also reads the
    retain data's probes."""

    tau: float = Field(default=0.95, gt=0, le=1)
    """Least part of the original's retention to keep."""

    tolerance: float = Field(default=0.01, gt=0, lt=1, allow_inf_nan=False)
    """Largest distance of the share found from the largest share that keeps the retention."""

    grid: int = Field(default=10, gt=0)
    """Number of equal steps from the original to the unlearned model for the first measurements."""


class ControlConfig(Sharding, Machine, Controlling, EvaluationInputs):
    """The settings that determine the numbers of a control; `run.yaml` keeps them for a replay."""

    panel = "Models and data"

    command: Literal["control"] = "control"
    """The command that replays the run."""

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
    """Folders or hub ids of unlearned models or of their adapters; each is controlled in turn."""

    forget: Annotated[PathOrId | None, Option(("--forget", "-f"))] = None
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`; it is
    measured at the share where each unlearned model keeps the same of the retain data."""

    retain: Annotated[PathOrId, Option(("--retain", "-r"))]
    """Data to keep, in the same format, on which retention is measured."""

    _written = field_validator("metrics")(as_text)

    _several = field_validator("unlearned", mode="before")(one_or_several)

    @model_validator(mode="after")
    def _once(self) -> ControlConfig:
        each_once("unlearned", self.unlearned)
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
            **self.evaluation_inputs(),
        }
        return {option: source for option, source in named.items() if source is not None}

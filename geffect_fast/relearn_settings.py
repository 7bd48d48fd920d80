"""Settings of `relearn`: how a model is trained on rows it has unlearned, and what is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from geffect_fast.evaluation_settings import Evaluating, as_text
from geffect_fast.setting_types import Option, PathOrId
from geffect_fast.settings import Machine


class Relearning(Evaluating):
    """How a model is trained on a few forget rows, and what is measured on the way."""

    n_rows: Annotated[int, Option(("--rows",))] = Field(default=5, gt=0)
    """Forget rows that are trained on, drawn by the seed; the others are measured beside."""

    steps: int = Field(default=20, gt=0)
    """Updates of the optimizer, each on all of these rows, or on batch_size of them."""

    measure_every: int = Field(default=5, gt=0)
    """Updates between two measurements; the first is before training, the last at its end."""

    learning_rate: Annotated[float, Option(("--learning-rate", "--lr"))] = Field(
        default=1e-5, gt=0, allow_inf_nan=False
    )
    """Learning rate, constant."""

    batch_size: int | None = Field(default=None, gt=0)
    """Rows an update; none: all that are trained on."""

    optimizer: str = "adamw_torch"
    """Optimizer of transformers: adamw_torch, sgd, adafactor ..."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides which rows are trained on, their order, and dropout."""

    @model_validator(mode="after")
    def _fits(self) -> Relearning:
        if self.measure_every > self.steps:
            raise ValueError(
                f"measure_every: {self.measure_every} is more than the {self.steps} steps; give at "
                "most as many"
            )
        if self.batch_size is not None and self.batch_size > self.n_rows:
            raise ValueError(
                f"batch_size: {self.batch_size} is more than the {self.n_rows} rows trained on; "
                "give fewer"
            )
        return self


class RelearnConfig(Machine, Relearning):
    """All that decides the numbers of a relearning; saved as `run.yaml`, it replays them."""

    command: Literal["relearn"] = "relearn"
    """The command that replays it."""

    model: Annotated[PathOrId, Option(("--model", "-m"))]
    """Folder or hub id of the unlearned model, or of its adapter."""

    original: PathOrId | None = None
    """Folder or hub id of the model before unlearning, trained and measured likewise."""

    retrained: PathOrId | None = None
    """Folder or hub id of a model trained without the forget data, likewise."""

    forget: Annotated[PathOrId, Option(("--forget", "-f"))]
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`."""

    tokenizer: PathOrId | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""

    rows: dict[str, str] = Field(default={})
    """Digests of the tokenised rows by data set; recorded, so that a replay tells other rows."""

    _written = field_validator("metrics")(as_text)

    def models(self) -> dict[str, str]:
        """What is trained, by what the result calls it."""
        named = {"unlearned": self.model, "original": self.original, "retrained": self.retrained}
        return {name: source for name, source in named.items() if source is not None}

    def inputs(self) -> dict[str, str]:
        """What is read, by the option that names it."""
        named = {
            "--model": self.model,
            "--original": self.original,
            "--retrained": self.retrained,
            "--forget": self.forget,
            "--tokenizer": self.tokenizer,
        }
        return {option: source for option, source in named.items() if source is not None}

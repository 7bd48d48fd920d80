"""Settings of `relearn`: the training on unlearned rows, and its measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from geffect_fast.evaluation_settings import Evaluating
from geffect_fast.setting_types import Option, PathOrId, number_or_all
from geffect_fast.settings import Machine, Sharding, as_text

_MUSE: Mapping[str, Any] = {
    "n_rows": "all",
    "batch_size": 4,
    "measure_every": 25,
    "optimizer": "adamw_torch",
    "learning_rate": 1e-5,
    "lr_schedule": "cosine",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_length": 2048,
}

Preset = Literal["sam-wmdp", "sam-muse-books", "sam-muse-news"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sam-wmdp": {
        "n_rows": 20,
        "batch_size": 4,
        "steps": 15,
        "measure_every": 5,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-5,
        "lr_schedule": "linear",
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 1,
        "max_length": 512,
    },
    "sam-muse-books": {**_MUSE, "steps": 100},
    "sam-muse-news": {**_MUSE, "steps": 150},
}
"""Settings of published relearning attacks by name: those of the paper on sharpness-aware
unlearning, arXiv 2502.05374, read from its code (github.com/OPTML-Group/Unlearn-Smooth at fc655ba).

    sam-wmdp         20 texts of 512 tokens, 3 epochs in batches of 4, warm-up over a tenth of the
                     updates (WMDP/configs Relearn+Forget.json, WMDP/src/model/relearn.py)
    sam-muse-books   all forget texts, 100 updates of 4; the paper measures at 50, 75 and 100
                     (MUSE/baselines/run_muse_relearn.sh, MUSE/baselines/finetune.py)
    sam-muse-news    the same in 150 updates; the paper measures at 100, 125 and 150

The survey 2402.08787 asks for relearning and names no settings of it.
"""


class Relearning(Evaluating):
    """Settings of the training on a few forget rows, and of the measures on the way."""

    panel = "Relearning"

    preset: Preset | None = None
    """Settings of a published attack: sam-wmdp, sam-muse-books or sam-muse-news (arXiv 2502.05374);
    settings that are given override them."""

    n_rows: Annotated[int | Literal["all"], Option(("--rows",), "N|all")] = Field(default=5)
    """Number of forget rows that are trained on, drawn by the seed, or all; the others are measured
    too. Windows of a long text are rows."""

    steps: int = Field(default=20, gt=0)
    """Updates of the optimizer, each on all rows that are trained on, or on batch_size of them."""

    measure_every: int = Field(default=5, gt=0)
    """Updates between two measurements; the first is before training, the last at its end."""

    learning_rate: Annotated[float, Option(("--learning-rate", "--lr"))] = Field(
        default=1e-5, gt=0, allow_inf_nan=False
    )
    """Learning rate, at its peak where the schedule changes it."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate: constant, or falling to 0 at the end, linear or cosine."""

    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises from 0."""

    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay of the optimizer."""

    max_grad_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Norm to which larger gradients are scaled down; none: gradients are not scaled."""

    batch_size: int | None = Field(default=None, gt=0)
    """Rows of an update; none: all rows that are trained on."""

    optimizer: str = "adamw_torch"
    """Optimizer of transformers: adamw_torch, sgd, adafactor ..."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draw of rows that are trained on, of their order, and of dropout."""

    _rows = field_validator("n_rows", mode="before")(number_or_all)

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fill in the preset's settings where none are given."""
        preset = values.get("preset")
        published = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        return {**published, **values}

    @model_validator(mode="after")
    def _fits(self) -> Relearning:
        if self.measure_every > self.steps:
            raise ValueError(
                f"measure_every: {self.measure_every} is more than the {self.steps} steps; give at "
                "most as many"
            )
        if self.batch_size and self.n_rows != "all" and self.batch_size > self.n_rows:
            raise ValueError(
                f"batch_size: {self.batch_size} is more than the {self.n_rows} rows trained on; "
                "give fewer"
            )
        return self


class RelearnConfig(Sharding, Machine, Relearning):
    """The settings that determine a relearning's numbers; `run.yaml` keeps them for a replay."""

    panel = "Models and data"

    command: Literal["relearn"] = "relearn"
    """The command that replays the run."""

    model: Annotated[PathOrId, Option(("--model", "-m"))]
    """Folder or hub id of the unlearned model, or of its adapter."""

    original: PathOrId | None = None
    """Folder or hub id of the model before unlearning; it is trained and measured as well."""

    retrained: PathOrId | None = None
    """Folder or hub id of a model trained without the forget data; it is trained and measured as
    well. forget_quality and privleak compare with this model as it is before relearning."""

    forget: Annotated[PathOrId, Option(("--forget", "-f"))]
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`."""

    holdout: PathOrId | None = None
    """Data that no model was trained on, like the forget data, for membership to compare with."""

    tokenizer: PathOrId | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""

    rows: dict[str, str] = Field(default={})
    """Digests of the tokenised rows by data set; recorded, so that a replay notices other rows."""

    _written = field_validator("metrics")(as_text)

    def models(self) -> dict[str, str]:
        """Paths or hub ids of the models to train, by their names in the result."""
        named = {"unlearned": self.model, "original": self.original, "retrained": self.retrained}
        return {name: source for name, source in named.items() if source is not None}

    def inputs(self) -> dict[str, str]:
        """Paths and hub ids that are read, by the option that names each."""
        named = {
            "--model": self.model,
            "--original": self.original,
            "--retrained": self.retrained,
            "--forget": self.forget,
            "--holdout": self.holdout,
            "--tokenizer": self.tokenizer,
        }
        return {option: source for option, source in named.items() if source is not None}

"""Settings of `evaluate`: models, data, metrics, tasks and the survey's assessment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from geffect_fast.paths import is_there, user_path
from geffect_fast.registry import each_once
from geffect_fast.setting_types import (
    Name,
    Option,
    PathOrId,
    canonical_list,
    one_or_several,
    read_by,
    texts_of,
)
from geffect_fast.settings import Machine, Metrics, Reading, Settings, Sharding, as_text


class Evaluating(Reading, Metrics):
    """Settings of metrics, and of reading the rows for them."""


class HarnessTasks(Settings):
    """The tasks of lm-evaluation-harness to run, and their settings."""

    panel = "Tasks of lm-evaluation-harness"

    lm_eval_tasks: Annotated[
        tuple[str, ...],
        BeforeValidator(texts_of),
        Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, with commas between: 'arc_easy,mmlu'; "
            "repeatable.",
            repeatable=True,
        ),
    ] = ()
    """Names of tasks, groups or tags of lm-evaluation-harness (extra lm-eval), such as arc_easy or
    mmlu; the harness's scores on its own data stand beside the measures, in the set lm_eval."""

    lm_eval_limit: int | None = Field(default=None, gt=0)
    """Number of rows of each task that are run, from the first on; none: all."""

    lm_eval_include: PathOrId | None = None
    """A folder of your own task files (YAML) for lm_eval_tasks."""

    lm_eval_batch_size: int = Field(default=8, gt=0)
    """Rows of a batch of lm_eval_tasks."""

    @model_validator(mode="after")
    def _of_tasks(self) -> HarnessTasks:
        each_once("lm_eval_tasks", self.lm_eval_tasks)
        for field in ("lm_eval_limit", "lm_eval_include"):
            if getattr(self, field) is not None and not self.lm_eval_tasks:
                raise ValueError(f"{field}: goes with lm_eval_tasks (--lm-eval-tasks NAMES)")
        return self

    def task_files(self) -> dict[str, str | None]:
        """The user's own task files, by the option that gives them."""
        if self.lm_eval_include is None:
            return {}
        found = sorted(user_path(self.lm_eval_include).rglob("*.yaml"))
        return {f"--lm-eval-include {path.name}": str(path) for path in found}


class MetricsAndTasks(Evaluating, HarnessTasks):
    """Settings of metrics and of tasks."""


class EvaluationInputs(Settings):
    """Data and models that metrics read beside forget and retain data, by path or hub id."""

    panel = "Models and data"

    holdout: PathOrId | None = None
    """Data that no model was trained on, like the forget data, for membership to compare with."""

    probes: Annotated[
        dict[Name, PathOrId],
        Option(("--probe",), "NAME=DATA", "A further data set under a name; repeatable."),
    ] = Field(default={})
    """Further data sets by name. model_utility reads real_authors and world_facts;
    knowledge_memorisation puts the answered questions of NAME_icl, such as forget_icl, before each
    question of the set NAME."""

    reference: PathOrId | None = None
    """Folder or hub id of the reference model of the metric `reference`."""

    retain_model: PathOrId | None = None
    """Folder or hub id of a model trained without the forget data, or TOFU's saved evaluation log
    of one (a .json file); forget_quality and privleak compare with it."""

    tokenizer: PathOrId | None = None
    """Folder or hub id of the tokenizer, where it is not the first model's own."""

    rows: dict[str, str] = Field(default={})
    """Digests of the tokenised rows by data set; recorded, so that a replay notices other rows."""

    def evaluation_inputs(self) -> dict[str, str | None]:
        """Paths and hub ids of these settings that are read, by the option that names each."""
        return {
            "--tokenizer": self.tokenizer,
            "--reference": self.reference,
            "--retain-model": self.retain_model,
            "--holdout": self.holdout,
            **{f"--probe {name}": source for name, source in self.probes.items()},
        }

    def is_log(self) -> bool:
        """Whether the retain model is given as a saved evaluation log."""
        given = self.retain_model
        return given is not None and given.endswith(".json") and is_there(user_path(given))


class Assessing(Settings):
    """Settings of the survey's assessment (suite survey) beside data and metrics."""

    panel = "Survey"

    original: PathOrId | None = None
    """Folder or hub id of the model before unlearning, for suite survey: e_u and e_r are measured
    at this model, and the part that unlearning changed is counted against it; none: the model that
    the runs of unlearn began from."""

    objectives: Annotated[
        tuple[str, ...],
        BeforeValidator(read_by("objectives", canonical_list)),
        Option(
            ("--objectives", "--objective"),
            "OBJECTIVE...",
            "Objectives whose e_u and e_r at the original model are shown in suite survey, in "
            "addition to those that runs of unlearn trained the models on; repeatable.",
            repeatable=True,
        ),
    ] = ()
    """Unlearning objectives, for suite survey, whose e_u and e_r at the original model stand beside
    the measures. The objectives that runs of unlearn trained the models on need not be given."""

    refusals: PathOrId | None = None
    """Refusals for po, dpo and altpo among the objectives of suite survey, one a line."""

    relearn: Annotated[
        dict[str, Any],
        Option(
            metavar="FIELD=VALUE",
            help="A setting of relearn for suite survey, such as steps=20 or preset=sam-wmdp; "
            "repeatable.",
        ),
    ] = Field(default={})
    """Settings of the relearning in suite survey, by their names in `relearn`, such as steps:
    20."""

    def assessed_inputs(self) -> dict[str, str | None]:
        """Paths and hub ids of these settings that are read, by the option that names each."""
        return {"--original": self.original, "--refusals": self.refusals}


class EvaluateConfig(Sharding, Machine, MetricsAndTasks, EvaluationInputs, Assessing):
    """The settings that determine an evaluation's numbers; `run.yaml` keeps them for a replay."""

    panel = "Models and data"

    command: Literal["evaluate"] = "evaluate"
    """The command that replays the run."""

    models: Annotated[
        tuple[PathOrId, ...],
        Option(
            ("--models", "--model", "-m"),
            "MODEL",
            "Folder or hub id of a model to evaluate; several may follow.",
            repeatable=True,
        ),
    ] = ()
    """Folders or hub ids of transformers causal language models, each evaluated in turn."""

    run: PathOrId | None = None
    """A folder of `unlearn` or of a Trainer, in place of models: its checkpoints are evaluated in
    turn, by step; of `unlearn` also the model before training and the one at its end."""

    against_effects: Annotated[
        tuple[PathOrId, ...],
        Option(
            ("--against-effects",),
            "RUN",
            help="A run of unlearn, or a folder of runs; several may follow. Their models are "
            "evaluated beside the original, and every change is set beside the effects at it.",
            repeatable=True,
        ),
    ] = ()
    """Folders of `unlearn` from one model, in place of models: the changes of the measures are
    compared with the effects at that model, by rank correlation."""

    forget: Annotated[PathOrId, Option(("--forget", "-f"))]
    """Data to forget: JSON (lines) with question and answer, or a hub id `name:config:split`."""

    retain: Annotated[PathOrId, Option(("--retain", "-r"))]
    """Data to keep, in the same format."""

    _written = field_validator("metrics")(as_text)

    _several = field_validator("models", "against_effects", mode="before")(one_or_several)

    @model_validator(mode="after")
    def _something(self) -> EvaluateConfig:
        if bool(self.models) + (self.run is not None) + bool(self.against_effects) != 1:
            raise ValueError("models: give exactly one of --models, --run and --against-effects")
        if len(self.against_effects) == 1:
            raise ValueError(
                f"against_effects: got one run, {self.against_effects[0]}; give two or more"
            )
        for field in Assessing.model_fields:
            if getattr(self, field) and self.suite != "survey":
                raise ValueError(f"{field}: goes with suite survey (--suite survey); leave it out")
        each_once("models", self.models)
        return self

    def inputs(self) -> dict[str, str]:
        """Paths and hub ids that are read, by the option that names each."""
        named = {
            **{f"--models {model}": model for model in self.models},
            "--run": self.run,
            **{f"--against-effects {run}": f"{run}/model" for run in self.against_effects},
            **{
                f"--against-effects {run}, effects": f"{run}/results.nc"
                for run in self.against_effects
            },
            "--forget": self.forget,
            "--retain": self.retain,
            **self.evaluation_inputs(),
            **self.assessed_inputs(),
            **self.task_files(),
        }
        return {option: source for option, source in named.items() if source is not None}

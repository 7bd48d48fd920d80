"""Tasks of lm-evaluation-harness on a model in memory, beside the measures of metrics."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.modes import evaluating
from geffect_fast.capture.shards import at_work
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.evaluation_settings import HarnessTasks
from geffect_fast.measure.harness_on_ranks import on_ranks
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.metrics.extra import lm_eval
from geffect_fast.paths import user_path
from geffect_fast.ranks import here
from geffect_fast.registry import nearest
from geffect_fast.trying import Trying

if TYPE_CHECKING:
    import xarray as xr

SET = "lm_eval"
"""Name of the set under which task scores stand. They are scores on the harness's own data."""

_STATISTIC = "task score"
_STANDARD_ERRORS = 1.96
_SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
"""The same seeds as the harness's own command has, so the scores are the same."""

_TOO_LONG = ("exceeds model's maximum length", "Left truncation applied")
"""Parts of the messages that the harness logs for each text that it cuts."""


class Harness:
    """Tasks that are known and whose data can be read, to be run on one model after another.

    Args:
        settings: the tasks, and how they are run.
        tokenizer: of the models; it is copied.
        sets: names of the data sets that the scores stand beside.

    Raises:
        InputError: the package is not installed, there is no tokenizer, a data set has the name of
            task scores, the folder of tasks is no folder, or a task is unknown (the nearest is
            offered) or cannot be loaded.
    """

    def __init__(self, settings: HarnessTasks, tokenizer: Any, sets: Iterable[str]) -> None:
        self._lm_eval = lm_eval()
        if tokenizer is None:
            raise InputError(
                "lm_eval_tasks: tasks are text, for which the model needs a tokenizer; give one "
                "(--tokenizer)"
            )
        if SET in sets:
            raise InputError(f"probes: the name '{SET}' is that of task scores; choose another")
        self._settings, self._tokenizer = settings, tokenizer
        folder = settings.lm_eval_include and user_path(settings.lm_eval_include)
        if folder and not folder.is_dir():
            raise InputError(
                f"lm_eval_include: {folder} is not a folder; give a folder of task files"
            )
        with _silently(True):
            self._known = self._lm_eval.tasks.TaskManager(
                include_path=str(folder) if folder else None
            )
        for task in settings.lm_eval_tasks:
            if task not in self._known.all_tasks:
                advice = nearest(task, self._known.all_tasks, "`lm_eval ls tasks` lists all tasks")
                raise InputError(f"lm_eval_tasks: unknown {task[:60]!r}; {advice}")
        for task in settings.lm_eval_tasks:
            with _silently(True), quiet_transformers(), _random_numbers_kept(), Trying() as trial:
                self._known.load([task])
            if trial.error is not None:
                raise InputError(_why_not(task, trial)) from trial.error

    def beside(
        self,
        measures: xr.Dataset,
        model: nn.Module,
        *,
        progress: bool = False,
        what: str = "model",
    ) -> xr.Dataset:
        """Run the tasks on a model and add their scores to its measures.

        The model and the generators of random numbers are left as they were. The ranks of a process
        group share out the requests of a task.

        Args:
            measures: of this model, as `geffect_fast.evaluate` returns them.
            model: of transformers.
            progress: show the harness's bars.
            what: the model's name in messages.

        Returns:
            The measures with the scores beside them.

        Raises:
            InputError: the harness cannot run a task on the model.
        """
        scores: dict[str, _Score] = {}
        ranks = here()
        with (
            ranks.in_step(ranks.size > 1 and is_sharded(model)),
            at_work(model),
            evaluating(model),
            _ties_kept(model),
            _random_numbers_kept(),
            _cut_texts_told(what),
            _silently(not progress),
        ):
            for task in self._settings.lm_eval_tasks:
                with Trying() as trial:
                    scores |= self._scores_of(task, model)
                if trial.error is not None:
                    raise InputError(
                        f"lm_eval_tasks: {task} cannot be run on the {what} ({trial.reason}); "
                        "leave the task out"
                    ) from trial.error
        scores = ranks.first_of(scores)
        found = measures.reindex(
            metric=[*measures["metric"].values.tolist(), *scores],
            set=[*measures["set"].values.tolist(), SET],
        )
        statistics = [*measures["statistic"].values.tolist(), *[_STATISTIC] * len(scores)]
        for name, score in scores.items():
            at, wide = {"metric": name, "set": SET}, _STANDARD_ERRORS * score.standard_error
            found["value"].loc[at] = score.value
            found["value_low"].loc[at] = score.value - wide
            found["value_high"].loc[at] = score.value + wide
        listed = [
            *json.loads(measures.attrs["metrics"]),
            *({"name": name, **score.described()} for name, score in scores.items()),
        ]
        return found.assign_coords(statistic=("metric", statistics)).assign_attrs(
            metrics=json.dumps(listed)
        )

    def _scores_of(self, task: str, model: nn.Module) -> dict[str, _Score]:
        """A task's scores by name; for a group or a tag also the scores of its tasks."""
        runs = on_ranks(self._lm_eval.models.huggingface.HFLM)(
            pretrained=model,
            tokenizer=copy.deepcopy(self._tokenizer),  # the harness may set its padding token
            batch_size=self._settings.lm_eval_batch_size,
        )
        results = self._lm_eval.simple_evaluate(
            runs,
            tasks=[task],
            limit=self._settings.lm_eval_limit,
            task_manager=self._known,
            log_samples=False,
            **_SEEDS,
        )
        found: dict[str, _Score] = {}
        if results is None:  # the harness has results on the first rank of a machine only
            return found
        for name, of in {**results["results"], **results.get("groups", {})}.items():
            run = {
                "shots": results["n-shot"].get(name),
                "rows": results["n-samples"].get(name, {}).get("effective"),
                "version": results["versions"].get(name),
                "lm_eval": self._lm_eval.__version__,
            }
            for key, value in of.items():
                score, comma, answers = key.partition(",")
                if not comma or score.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = of.get(f"{score}_stderr,{answers}")
                has = isinstance(error, int | float)
                found[_score_name(name, score, answers)] = _Score(
                    float(value), float(error) if has else np.nan, f"{score} of {name}", run
                )
        return found


@dataclass(frozen=True)
class _Score:
    """A score of a task.

    Attributes:
        value: the score.
        standard_error: the harness's own; NaN where it has none.
        of: the score and its task, in words.
        run: number of examples before each question (`shots`), rows, and versions of the task and
            of the harness.
    """

    value: float
    standard_error: float
    of: str
    run: Mapping[str, Any]

    def described(self) -> dict[str, Any]:
        """The parameters and the sentence that reports show of the score."""
        said = [f"{self.of} (lm_eval {self.run['lm_eval']})"]
        said += [] if self.run["shots"] is None else [f"{self.run['shots']} examples before each"]
        said += [] if self.run["rows"] is None else [f"{self.run['rows']} rows"]
        return {"parameters": dict(self.run), "about": f"{', '.join(said)}."}


def _score_name(task: str, score: str, answers: str) -> str:
    """A score as `TASK/SCORE`, with the filter of answers where there is one."""
    return f"{task}/{score}" if answers == "none" else f"{task}/{score}(filter={answers})"


def _why_not(task: str, trial: Trying) -> str:
    """The message for a task that does not load, most often for want of its data."""
    told: BaseException | None = trial.error
    while told is not None:
        if isinstance(told, OSError) or "offline" in type(told).__name__.lower():
            return (
                f"lm_eval_tasks: the data of {task} cannot be fetched ({trial.reason}); see that "
                "its hub or file can be reached, or leave the task out"
            )
        told = told.__cause__ or told.__context__
    return (
        f"lm_eval_tasks: {task} cannot be loaded ({trial.reason}); mend its file, or leave the "
        "task out"
    )


@contextmanager
def _silently(silent: bool) -> Iterator[None]:
    """If `silent`, hide the bars that the harness and `datasets` draw on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext():
        yield


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Restore the random numbers of Python, numpy and torch afterwards; the harness seeds them."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _ties_kept(model: nn.Module) -> Iterator[None]:
    """Keep the harness from tying weights, which would change a model whose weights are untied."""
    own = vars(model)
    own["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del own["tie_weights"]


class _Cut(logging.Handler):
    """Log handler that notes whether the harness cuts texts, and drops all other records."""

    some = False

    def emit(self, record: logging.LogRecord) -> None:
        self.some |= any(sign in record.getMessage() for sign in _TOO_LONG)


@contextmanager
def _cut_texts_told(what: str) -> Iterator[None]:
    """Warn afterwards, in one line, if the harness cut texts that were too long for the model."""
    logger, cut = logging.getLogger("lm_eval"), _Cut()
    before = logger.propagate, logger.level
    logger.addHandler(cut)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(cut)
        logger.propagate, logger.level = before
    if cut.some:
        warnings.warn(
            f"{what}: lm_eval cut texts that are longer than the model allows, from the left; "
            "tasks are scored on the rest",
            GEffectWarning,
            stacklevel=3,
        )

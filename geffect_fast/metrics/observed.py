"""Observations of a model on the rows of one data set, from which metrics are computed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geffect_fast.data.row_kinds import RowKind
from geffect_fast.errors import InputError


@dataclass(frozen=True)
class Scored:
    """Scores of one sequence's `n` label tokens by a model, teacher-forced.

    Attributes:
        mean_loss: mean negative log-probability of the label tokens, in nats.
        log_prob: `(n,)` fp64, log-probability of every label token; None where a saved log holds
            only the mean.
        greedy: `(n,)` bool, whether the label is the most probable token, of equal ones the first;
            None for a saved log.
        mean, spread: `(n,)` fp64, mean and standard deviation of the log-probability of a token
            drawn from the model; None where no metric needs them.
    """

    mean_loss: float
    log_prob: np.ndarray | None = None
    greedy: np.ndarray | None = None
    mean: np.ndarray | None = None
    spread: np.ndarray | None = None


@dataclass(frozen=True)
class Observed:
    """Observations of a model on a data set; a list has an entry a row, or is None if not needed.

    Attributes:
        name: name of the set.
        answers: scores of the answer to the question.
        paraphrases: scores of `paraphrased_answer`.
        perturbed: scores of each `perturbed_answer`.
        rephrased: scores of the answer to `paraphrased_question`.
        choices: scores of each choice of a question.
        right: number of the choice that is the answer.
        texts: the answers as text.
        continuations: the greedy continuation of each prompt, as text.
        truths: the data's own text after each prompt.
        written: continuations and truths for metrics that limit the number of tokens, by that
            number.
        norms: norms of the gradients of the rows' mean losses, `(n,)` fp64, by need.
        reference: scores of the answer by the reference model.
        prompts: in a saved log, the prompt of each continuation.
        kind: kind of the rows.
    """

    name: str
    answers: list[Scored] | None = None
    paraphrases: list[Scored] | None = None
    perturbed: list[list[Scored]] | None = None
    rephrased: list[Scored] | None = None
    choices: list[list[Scored]] | None = None
    right: list[int] | None = None
    texts: list[str] | None = None
    continuations: list[str] | None = None
    truths: list[str] | None = None
    written: Mapping[int, tuple[list[str], list[str]]] | None = None
    norms: dict[str, np.ndarray] = field(default_factory=dict)
    reference: list[Scored] | None = None
    prompts: list[str] | None = None
    kind: RowKind = "question"

    def has(self, needs: Collection[str]) -> bool:
        """Whether the set's rows were observed for all of these needs.

        The needs `retain_model` and `holdout` are not about the set itself, and are left out.
        """
        return all(
            need in self.norms
            or getattr(self, "answers" if need == "distribution" else need, None) is not None
            for need in needs
            if need not in ("retain_model", "holdout")
        )

    @property
    def losses(self) -> np.ndarray:
        """Mean losses of the answers, `(n,)`."""
        return losses_of(required(self.answers))


def required(value: Any) -> Any:
    """The value itself, which is not None, since the metric that reads it names it as a need."""
    assert value is not None, "read without being among the metric's needs"
    return value


def losses_of(scored: list[Scored]) -> np.ndarray:
    """Mean losses, `(n,)` fp64."""
    return np.array([each.mean_loss for each in scored], dtype=np.float64)


_FILES = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
"""Names of the sets' logs in TOFU's aggregated logs."""


def read_log(path: str | Path) -> dict[str, Observed]:
    """Read the observations of a model, by set, from a saved evaluation log of TOFU.

    Args:
        path: a JSON file as TOFU's `aggregate_eval_stat.py` reads it: an object of logs by file
            name (`eval_log_forget.json` ...), or one such log alone, taken as the forget set's.

    Raises:
        InputError: the file cannot be read, or is no such log.
    """
    try:
        held = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"log {path} cannot be read: {error.strerror}; give TOFU's JSON") from None
    except (ValueError, RecursionError):
        raise InputError(f"log {path} is no JSON; give TOFU's aggregated evaluation log") from None
    if isinstance(held, dict) and "avg_paraphrased_loss" in held:
        held = {_FILES["forget"]: held}
    if not isinstance(held, dict) or not any(file in held for file in _FILES.values()):
        raise InputError(
            f"log {path} holds no {_FILES['forget']}; give TOFU's aggregated evaluation log"
        )
    try:
        return {name: _of_log(name, held[file]) for name, file in _FILES.items() if file in held}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"log {path} is not of TOFU's form ({type(error).__name__}: {error}); give the JSON "
            "that its aggregate_eval_stat.py reads"
        ) from None


def _of_log(name: str, log: dict[str, dict[str, Any]]) -> Observed:
    """The observations in the log of one set; TOFU's keys are row numbers, in order."""
    rows = list(log["avg_paraphrased_loss"])

    def column(key: str) -> list[Any]:
        return [log[key][row] for row in rows]

    texts = column("generated_text") if "generated_text" in log else None
    return Observed(
        name,
        answers=[Scored(float(x)) for x in column("avg_gt_loss")] if "avg_gt_loss" in log else None,
        paraphrases=[Scored(float(x)) for x in column("avg_paraphrased_loss")],
        perturbed=[[Scored(float(y)) for y in x] for x in column("average_perturb_loss")],
        # Each text is the question, the generated answer, and the true answer.
        continuations=None if texts is None else [str(text[1]) for text in texts],
        truths=None if texts is None else [str(text[2]) for text in texts],
        prompts=None if texts is None else [str(text[0]) for text in texts],
    )

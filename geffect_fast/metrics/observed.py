"""What was seen of a model on the rows of one data set: all that metrics are made of."""

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
    """What a model says of one sequence's `n` label tokens, teacher-forced.

    Attributes:
        mean_loss: mean negative log-probability of its label tokens, in nats.
        log_prob: `(n,)` fp64, of every label token; None where a saved log says only the mean.
        greedy: `(n,)` bool, whether the label is the most probable token, the first of equals.
        mean, spread: `(n,)` fp64, mean and standard deviation of the log-probability of a token
            drawn from the model; None where nobody asked.
    """

    mean_loss: float
    log_prob: np.ndarray | None = None
    greedy: np.ndarray | None = None
    mean: np.ndarray | None = None
    spread: np.ndarray | None = None


@dataclass(frozen=True)
class Observed:
    """What a model says of a data set; each list has an entry a row, and is None if not asked for.

    Attributes:
        name: of the set.
        answers: of the answer to the question.
        paraphrases: of `paraphrased_answer`.
        perturbed: of each `perturbed_answer`.
        rephrased: of the answer to `paraphrased_question`.
        choices: of each choice of a question.
        right: which choice is the answer.
        texts: the answers themselves.
        continuations: what greedy decoding puts after each prompt.
        truths: what stands there in the data.
        written: continuations and truths where a metric says how many tokens it reads at most, by
            that number.
        norms: of the gradients of the rows' mean losses, `(n,)` fp64, by the need they answer.
        reference: of the answer, by the reference model.
        prompts: in a saved log, what stood before what was generated.
        kind: of its rows.
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
        """Whether all of this was seen of the set's rows."""
        return all(
            need in self.norms
            or getattr(self, "answers" if need == "distribution" else need, None) is not None
            for need in needs
            if need not in ("retain_model", "holdout")
        )

    @property
    def losses(self) -> np.ndarray:
        """Mean losses of the answers, `(n,)`."""
        return losses_of(known(self.answers))


def known(value: Any) -> Any:
    """What is there, since the metric that reads it has it among its needs."""
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
"""What TOFU's aggregated logs call the sets."""


def read_log(path: str | Path) -> dict[str, Observed]:
    """What a saved evaluation log of TOFU says of a model, by set.

    Args:
        path: a JSON file by TOFU's `aggregate_eval_stat.py`: an object of logs by file name
            (`eval_log_forget.json` ...), or one of these logs itself, taken as the forget set's.

    Raises:
        InputError: it is no such file.
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
    """The log of one set; TOFU's keys are row numbers, in order."""
    rows = list(log["avg_paraphrased_loss"])

    def column(key: str) -> list[Any]:
        return [log[key][row] for row in rows]

    texts = column("generated_text") if "generated_text" in log else None
    return Observed(
        name,
        answers=[Scored(float(x)) for x in column("avg_gt_loss")] if "avg_gt_loss" in log else None,
        paraphrases=[Scored(float(x)) for x in column("avg_paraphrased_loss")],
        perturbed=[[Scored(float(y)) for y in x] for x in column("average_perturb_loss")],
        # Question, what was generated, and the answer.
        continuations=None if texts is None else [str(text[1]) for text in texts],
        truths=None if texts is None else [str(text[2]) for text in texts],
        prompts=None if texts is None else [str(text[0]) for text in texts],
    )

"""Imports from the optional extras `evaluate` and `lm-eval`, with errors where one is missing."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from geffect_fast.errors import InputError


def _needed(module: str, package: str, what: str, extra: str = "evaluate") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{what} needs the package {package}: pip install 'geffect-fast[{extra}]'"
        ) from None


def scipy_stats(what: str) -> Any:
    """The module `scipy.stats`; `what` names in the error what needs it."""
    return _needed("scipy.stats", "scipy", what)


def roc_auc_score() -> Any:
    """scikit-learn's `roc_auc_score`."""
    return _needed("sklearn.metrics", "scikit-learn", "membership").roc_auc_score


@cache
def rouge_scorer(*, use_stemmer: bool) -> Any:
    """A scorer of ROUGE-L from the package rouge-score."""
    scorers = _needed("rouge_score.rouge_scorer", "rouge-score", "ROUGE")
    return scorers.RougeScorer(["rougeL"], use_stemmer=use_stemmer)


def lm_eval() -> Any:
    """The module `lm_eval` of lm-evaluation-harness, with its models of transformers imported."""
    for module in ("lm_eval.tasks", "lm_eval.models.huggingface"):
        _needed(module, "lm_eval", "lm_eval_tasks", "lm-eval")
    return importlib.import_module("lm_eval")

"""Registered metrics by name, lists of metrics as text, and the suites of benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import yaml
from pydantic.fields import FieldInfo

from geffect_fast.arguments import checked_config
from geffect_fast.errors import InputError
from geffect_fast.metrics.base import Metric
from geffect_fast.registry import Registry, each_once, nearest

M = TypeVar("M", bound=type[Metric])

_CALL = re.compile(r"\s*(?P<name>[^()\s]+)\s*(\((?P<inside>[^()]*)\))?\s*")
_COMMA = re.compile(r",(?![^()]*\))")

DEFAULT = ("probability", "extraction_strength", "exact_memorisation")
"""Metrics that are measured where none is named: of one forward pass, for rows of any kind."""

SUITES: dict[str, tuple[str, ...]] = {
    "tofu": ("forget_quality", "model_utility", "probability", "rouge_l", "truth_ratio"),
    "muse": ("verbatim_memorisation", "knowledge_memorisation", "privleak"),
    "survey": (
        *("probability", "rouge_l", "extraction_strength", "min_k"),
        "paraphrased_extraction_strength",
    ),
}
"""Suites by the names of benchmarks: the metrics of each that can be measured on rows.

- `tofu`: TOFU (2401.06121).
- `muse`: MUSE (2407.06460), with its few-shot examples where they are given as `NAME_icl`, and
  without the sizes and numbers of requests that it varies.
- `survey`: the metrics in the assessment of the survey 2402.08787: efficacy in scope, utility out
  of scope, and paraphrases. `geffect_fast.training.survey` has the rest of the assessment.
"""


def _check(name: str, cls: type[Metric]) -> None:
    if cls.scores is Metric.scores and cls.measures is Metric.measures:
        raise InputError(f"metric {name!r}: {cls.__name__} must define scores()")
    if "written" in cls.needs and cls.most_written is Metric.most_written:
        raise InputError(
            f"metric {name!r}: {cls.__name__} needs 'written', so it must define most_written()"
        )
    declared: FieldInfo
    for field, declared in vars(cls)["__pydantic_fields__"].items():
        if declared.is_required():
            raise InputError(f"metric {name!r}: {field!r} has no default; give it one")


METRICS: Registry[Metric] = Registry(Metric, "metric", _check, unknown="metrics: unknown")


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a metric usable by `name` in lists of metrics.

    To run the definition of the same class again replaces the metric, as notebooks need.

    Args:
        name: lower-case letters, digits and underscores, not yet taken.

    Raises:
        InputError: the name is unusable or taken, or the class is no metric that defines `scores`
            or `measures`, or a hyper-parameter has no default.

    Examples:
        >>> @register("surprise")
        ... class Surprise(Metric): ...
    """
    return METRICS.register(name)


def available() -> tuple[str, ...]:
    """Names of all registered metrics, in alphabetical order."""
    return METRICS.available()


def resolved_metrics(
    metrics: str | Metric | Iterable[str | Metric] = (), suite: str | None = None
) -> list[Metric]:
    """The metrics that a list and a suite name, each once.

    Args:
        metrics: metrics, or texts such as `probability` and `min_k(k=0.2)`; one text may hold
            several, separated by commas. `DEFAULT` where neither these nor a suite are given.
        suite: name of a list in `SUITES`, whose metrics come first.

    Raises:
        InputError: a name is unknown (the nearest is offered), a hyper-parameter is wrong, or a
            metric is listed twice.
    """
    given = [metrics] if isinstance(metrics, str | Metric) else list(metrics)
    if suite is not None and suite not in SUITES:
        raise InputError(f"suite: unknown {suite!r}; {nearest(suite, tuple(SUITES))}")
    if suite is None and not given:
        given = list(DEFAULT)
    found: list[Metric] = []
    for each in (*SUITES.get(suite or "", ()), *given):
        if isinstance(each, Metric):
            found.append(each)
        elif isinstance(each, str):
            found += [_parsed(text) for text in _COMMA.split(each)]
        else:
            raise InputError(f"metrics: got {each!r}; give names, such as 'probability'")
    return list(each_once("metrics", found))


def _parsed(text: str) -> Metric:
    """The metric that a text `name` or `name(hyper_parameter=value, ...)` stands for."""
    call = _CALL.fullmatch(text)
    if call is None:
        raise InputError(f"metrics: {text.strip()!r} must be a name, or such as 'min_k(k=0.2)'")
    cls = METRICS.lookup(call["name"])
    values = {}
    for pair in (call["inside"] or "").split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not pair.strip():
            continue
        if not (key and equals and value):
            raise InputError(
                f"metrics: {pair.strip()!r} in {text.strip()!r} must be NAME=VALUE, such as k=0.2"
            )
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key] = value
    return checked_config(cls, values, f"metric {cls.name}")

"""The measures of a model as a Dataset: by metric and set, and by metric and sample."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.metrics.base import ALL, Measure, Metric
from geffect_fast.metrics.observed import Observed
from geffect_fast.metrics.rows import DataRows
from geffect_fast.results.dataset import versions
from geffect_fast.results.intervals import LEVEL

if TYPE_CHECKING:
    import xarray as xr


def measures_dataset(
    metrics: Sequence[Metric],
    measures: Sequence[Mapping[str, Measure]],
    sets: Mapping[str, DataRows],
    seen: Mapping[str, Observed],
    attributes: Mapping[str, Any],
) -> xr.Dataset:
    """The Dataset that `geffect_fast.evaluate` returns.

    Args:
        metrics: the metrics that were measured.
        measures: numbers of each metric, by set.
        sets: the data sets by name.
        seen: observations of each set.
        attributes: further attributes of the result.
    """
    import xarray as xr

    names = [*sets, *([ALL] if any(ALL in found for found in measures) else [])]
    table = np.full((3, len(metrics), len(names)), np.nan)
    for m, found in enumerate(measures):
        for name, measure in found.items():
            between = np.clip((measure.low, measure.high), *metrics[m].within)
            table[:, m, names.index(name)] = measure.value, *between
    scores = [
        np.concatenate([_scores(metric, of, len(sets[name])) for name, of in seen.items()])
        for metric in metrics
    ]
    both, rows = ("metric", "set"), ("metric", "sample")
    sizes = {name: len(of) for name, of in sets.items()}
    questions = [sample.question for of in sets.values() for sample in of.answers.samples]
    return xr.Dataset(
        {
            "value": (both, table[0]),
            "value_low": (both, table[1]),
            "value_high": (both, table[2]),
            "sample_value": (rows, np.stack(scores)),
        },
        {
            "metric": list(map(str, metrics)),
            "statistic": ("metric", [metric.statistic for metric in metrics]),
            "set": names,
            "sample": np.concatenate([np.arange(n) for n in sizes.values()]),
            "sample_set": ("sample", np.repeat(list(sizes), list(sizes.values()))),
            "question": ("sample", questions),
        },
        {
            "metrics": json.dumps(
                [
                    {"name": m.name, "parameters": m.model_dump(), "about": _about(m)}
                    for m in metrics
                ]
            ),
            "n_rows": json.dumps(sizes),
            "interval_level": LEVEL,
            "versions": json.dumps(versions()),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **attributes,
        },
    )


def _about(metric: Metric) -> str:
    """The first paragraph of a metric's docstring, in one line and without backticks."""
    written = (inspect.getdoc(type(metric)) or "").partition("\n\n")[0]
    return " ".join(written.replace("`", "").split())


def _scores(metric: Metric, seen: Observed, n: int) -> np.ndarray:
    """A metric's scores of a set's `n` rows; NaN where the metric has no scores there."""
    scores = metric.scores(seen) if metric.measurable(seen) else None
    return np.full(n, np.nan) if scores is None else scores

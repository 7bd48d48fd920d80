"""Metrics that are measured at steps of a training, beside the effects of its probes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.arguments import checked_config
from geffect_fast.data import SampleSet, read_rows
from geffect_fast.data.samples import evenly
from geffect_fast.errors import InputError
from geffect_fast.evaluation_settings import Evaluating
from geffect_fast.measure.evaluator import Evaluator, Model, checked_probes
from geffect_fast.settings import LiveMetrics, Reading

if TYPE_CHECKING:
    import xarray as xr

_NAMES = {
    "value": "measure",
    "value_low": "measure_low",
    "value_high": "measure_high",
    "set": "measured_set",
}
"""Names in results of probes for variables of `geffect_fast.evaluate`."""


class LiveMeasures:
    """The metrics of a training: their data, read once, and the steps at which they are due.

    Args:
        model: the model in training, with its adapter, if any.
        tokenizer: as in `geffect_fast.evaluate`.
        sources: data sets by name, as `geffect_fast.evaluate` takes them: `forget`, `retain` and
            probes.
        settings: the metrics, the steps at which they are due, and the number of rows they read.
        reading: settings that turn rows into tokens, and the token budget of the evaluation.
        holdout, reference_model, retain_model: as in `geffect_fast.evaluate`.

    Attributes:
        identity: everything but the weights that decides the numbers, in values that JSON can hold.

    Raises:
        InputError: a metric is unknown, or its data or models are not given.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sources: Mapping[str, Any],
        settings: LiveMetrics,
        reading: Reading,
        *,
        holdout: Any = None,
        reference_model: Model | None = None,
        retain_model: Model | None = None,
    ) -> None:
        self._every = settings.evaluate_every or 1
        checked_probes({n: each for n, each in sources.items() if n not in ("forget", "retain")})
        rows = {
            name: _some(_read(source, name, reading), settings.evaluate_rows)
            for name, source in {**sources, "holdout": holdout}.items()
            if source is not None
        }
        evaluating = Evaluating(
            metrics=settings.metrics,
            suite=settings.suite,
            max_new_tokens=settings.max_new_tokens,
            **reading.fields(Reading),
        )
        self._evaluator = Evaluator(
            model, tokenizer, evaluating, rows, reference_model, retain_model
        )
        self._attributes = {
            "suite": settings.suite or "",
            "measured_rows": json.dumps({name: len(of) for name, of in rows.items()}),
        }
        self.identity: dict[str, Any] = {
            "metrics": [str(metric) for metric in self._evaluator.metrics],
            "max_new_tokens": settings.max_new_tokens,
            "evaluate_every": self._every,
            "rows": self._evaluator.rows,
        }

    def beside(
        self,
        result: xr.Dataset,
        earlier: xr.Dataset | None,
        model: nn.Module,
        step: int,
        last: bool,
    ) -> xr.Dataset:
        """The result of a probe with the measures of the model added, NaN where none are due.

        Measures are due at the first step, at every `evaluate_every`-th step and at the last.

        Args:
            result: the probe's result.
            earlier: the result of an earlier step; None at the first step.
            model: the model as it is now, at rest.
            step: number of updates done.
            last: whether training ends here.
        """
        names = ["measure", "measure_low", "measure_high"]
        if earlier is not None and step % self._every and not last:
            found = earlier[names].drop_vars("step", errors="ignore").where(False)
            metrics = earlier.attrs["metrics"]
        else:
            measured = self._evaluator.measure(model, what=f"model at step {step}")
            found = measured[["value", "value_low", "value_high"]].rename(_NAMES)
            metrics = measured.attrs["metrics"]
        said = {"metrics": metrics, **self._attributes}
        return result.assign({name: found[name] for name in names}).assign_attrs(said)


def live_metrics(every: int, **values: Any) -> LiveMetrics:
    """Settings of metrics for a callback that probes every `every` updates.

    Raises:
        InputError: a setting is unusable, or does not fit `every`.
    """
    settings = checked_config(LiveMetrics, values)
    try:
        settings.check_every(every, "every")
    except ValueError as error:
        raise InputError(str(error)) from None
    return settings


def _read(source: Any, name: str, reading: Reading) -> Any:
    if isinstance(source, SampleSet):
        return source
    return read_rows(source, name=name, data_format=reading.data_format)


def _some(rows: Any, wanted: int | str | None) -> Any:
    """`wanted` of the rows, evenly chosen; all rows where `wanted` is None or `all`."""
    if wanted in (None, "all"):
        return rows
    chosen = evenly(len(rows), int(wanted))
    return rows.part(chosen) if isinstance(rows, SampleSet) else [rows[i] for i in chosen]

"""`control`: unlearned models compared at equal retention (UWC, arXiv 2406.09179)."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from geffect_fast.arguments import checked_config, with_settings
from geffect_fast.capture.compat import check_finite, check_is_model, is_sharded
from geffect_fast.control_settings import Controlling
from geffect_fast.errors import InputError
from geffect_fast.evaluation_settings import Evaluating
from geffect_fast.measure.evaluator import Evaluator, Model, checked_probes
from geffect_fast.measure.mixture import Mixture
from geffect_fast.measure.models import load_like, load_model
from geffect_fast.measure.sources import read_sets
from geffect_fast.metrics.base import ALL, FORGET, HOLDOUT, RETAIN, Measure
from geffect_fast.metrics.gradient_norms import NORM_NEEDS
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.paths import short_names
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.registry import each_once
from geffect_fast.storage.model_folder import new_folder
from geffect_fast.terminal import progress_bar

if TYPE_CHECKING:
    import xarray as xr


@with_settings(Controlling)
@on_all_ranks
def control(
    original: Model,
    unlearned: Model | Sequence[Model] | Mapping[str, Model],
    tokenizer: Any,
    *,
    retain: Any,
    forget: Any = None,
    holdout: Any = None,
    probes: Mapping[str, Any] | None = None,
    reference_model: Model | None = None,
    retain_model: Model | None = None,
    save: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """Measure unlearned models at equal retention: mixed with the original until each keeps enough.

        theta(alpha) = (1 - alpha) theta_original + alpha theta_unlearned

    For each unlearned model the largest `alpha` is found at which the metric on the retain data is
    at least `tau` of the original's, and all metrics are measured there. Retention is measured on a
    grid of `alpha` first. The step of the grid in which retention is lost for good is then halved
    until it is at most `tolerance`.

    The models given are not changed. Memory holds the original, one unlearned model, and one
    working model on the original's device. For an unlearned model with an adapter, the working
    model is a copy of the adapter's base and the weights that the adapter adds. The ranks of a
    process group share out the rows, and each returns the whole result; the first rank saves.
    Models that `fully_shard` wraps cannot be copied, so they are written to and put back;
    `fully_shard` must have wrapped all of the models.

    Args:
        original: the model before unlearning, a module or the folder of one; it may have an
            adapter.
        unlearned: one model, several, or several by name. Each is a module, or a folder; folders
            are loaded one after another in the original's precision. A model has the original's
            structure, or a LoRA adapter on the original, or one on the base of the original's
            adapter. Adapters are mixed as adapters, exactly.
        tokenizer, holdout, probes, reference_model, retain_model: as `geffect_fast.evaluate` takes
            them.
        retain: what must stay, on which retention is measured; as `geffect_fast.evaluate` takes it.
            A metric of several sets together, such as model_utility, also reads its probes.
        forget: what must go; None: nothing is measured there.
        save: a new folder; the model found for each method is written there, in a folder named as
            the method. A mixture of two adapters is written as one, whose rank is the sum of
            theirs.
        progress: show a bar.
        settings:

    Returns:
        A Dataset along `model`, the unlearned models by name; all fp64. `alpha_chosen` (model) is
        the largest `alpha` found. `alpha_lost` (model) is the smallest measured beyond that, at
        most `tolerance` away, at which too little is kept; NaN where the unlearned model itself
        keeps enough.

        `retention` (model, alpha) with `retention_low`, `retention_high` is the metric on the
        retain data (or its number of several sets together) at each `alpha` where it was measured,
        else NaN; the coordinate `on_grid` (alpha) says whether an `alpha` is on the grid.
        `monotone` (model): whether retention never rises along the grid.

        `value`, `value_low`, `value_high` (model, metric, set) and `sample_value` (model, metric,
        sample) are the measures of `geffect_fast.evaluate` at `alpha_chosen`. `original_value`
        (metric, set) is the value of the original, and `unlearned_value` (model, metric, set) that
        of the unlearned models as they are.

    Raises:
        InputError: two models cannot be mixed, or are the same; the metric has no number on retain,
            or is zero for the original; data or settings are unusable. The message is one line.
        NonFiniteError: a weight or log-probability is not finite; the first is named.

    Examples:
        >>> result = gf.control(original, {"ga": "ga/model", "npo": "npo/model"}, tokenizer,
        ...                     retain="retain.jsonl", forget="forget.jsonl")
        >>> result.value.sel(metric="extraction_strength", set="forget")
    """
    checked = checked_config(Controlling, settings)
    named = methods_by_name(unlearned)
    sources = {FORGET: forget, RETAIN: retain, HOLDOUT: holdout, **checked_probes(probes)}
    first = here().first
    with new_folder(save, "save") if save is not None and first else nullcontext() as folder:
        check_save_names(folder, named)
        model = original
        if not isinstance(model, nn.Module):
            trusted = checked.trust_remote_code
            model = load_model(model, what="original", trust_remote_code=trusted)
        found = Control(model, tokenizer, checked, sources, reference_model, retain_model)
        return found.of(named, found.loaded, folder, progress=progress)


def methods_by_name(unlearned: Any) -> dict[str, Model]:
    """Unlearned models by the names given, by their folders, or by number.

    Raises:
        InputError: there is no model, or a folder is listed twice.
    """
    if isinstance(unlearned, Mapping):
        named = {str(name): model for name, model in unlearned.items()}
    elif isinstance(unlearned, str | Path):
        named = {**short_names([str(unlearned)])}
    elif isinstance(unlearned, nn.Module):
        named = {"unlearned": unlearned}
    elif isinstance(unlearned, Sequence) and all(isinstance(u, str | Path) for u in unlearned):
        named = {**short_names(each_once("unlearned", map(str, unlearned)))}
    elif isinstance(unlearned, Sequence):
        named = {f"unlearned {i}": model for i, model in enumerate(unlearned, 1)}
    else:
        named = {}
    if not named:
        raise InputError("unlearned: give a model, or several, by name or in a list")
    return named


def check_save_names(folder: Path | None, named: Mapping[str, Any]) -> None:
    """Raise `InputError` where mixed models are to be saved under names that no folder can have."""
    for name in named if folder is not None else ():
        if "/" in name or name in ("", ".", ".."):
            raise InputError(
                f"save: {name!r} is no name of a folder; give unlearned models by name"
            )


@dataclass(frozen=True)
class LargestAlpha:
    """The largest `alpha` of an unlearned model that was found to keep enough.

    Attributes:
        alpha: the value found, at which enough is kept.
        lost: the smallest `alpha` measured beyond it, at which too little is kept; NaN where
            `alpha` is 1.
        monotone: whether retention never rises along the grid.
    """

    alpha: float
    lost: float
    monotone: bool


def largest_alpha(
    kept: Callable[[float], float], tau: float, grid: int, tolerance: float
) -> LargestAlpha:
    """The largest `alpha` that keeps at least `tau` of the retention at 0.

    The last point of the grid at which enough is kept is refined by bisection. So where retention
    falls and rises again, the last fall that the grid shows is found.

    Args:
        kept: the retention at an `alpha` from 0 to 1; `kept(0)` is positive.
        tau: the part of `kept(0)` that is enough.
        grid: number of equal steps from 0 to 1.
        tolerance: largest distance between the `alpha` found and the one beyond it.
    """
    alphas = [step / grid for step in range(grid + 1)]
    values = [kept(alpha) for alpha in alphas]
    least = tau * values[0]
    monotone = all(after <= before for before, after in pairwise(values))
    last = max(step for step, value in enumerate(values) if value >= least)
    if last == grid:
        return LargestAlpha(1.0, math.nan, monotone)
    low, high = alphas[last], alphas[last + 1]
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) >= least else (low, middle)
    return LargestAlpha(low, high, monotone)


class Control:
    """Data sets, metrics and the original's own measures, prepared once for all methods.

    Args:
        original: the model before unlearning, in eval mode or not; never changed.
        tokenizer: as for `control`.
        settings: the retention metric and what else is measured.
        sources: data sets by name; None is left out.
        reference_model, retain_model: as for `control`.
        device: where mixtures are measured; None: on the original's device.

    Attributes:
        rows: digests of the tokenised rows, by set.
    """

    def __init__(
        self,
        original: nn.Module,
        tokenizer: Any,
        settings: Controlling,
        sources: Mapping[str, Any],
        reference_model: Model | None = None,
        retain_model: Model | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_is_model(original, "original")
        check_finite(original, "original")
        self._original, self._tokenizer, self._settings = original, tokenizer, settings
        self._metric = _retention_metric(settings.metric)
        if sources[RETAIN] is None:
            raise InputError("retain: is missing; give what is to be kept")
        self._working = original
        if not is_sharded(original):  # else `Mixture` writes to the original and puts it back
            place = device or next(original.parameters()).device
            self._working = copy.deepcopy(original).to(place)
        self._check_forget(sources, retain_model)
        read = read_sets(sources, settings.data_format)
        values = settings.fields(Evaluating)
        self._evaluator = Evaluator(
            self._working, tokenizer, Evaluating(**values), read, reference_model, retain_model
        )
        kept = values | {"metrics": (self._metric,), "suite": None}
        together = {name for name in read if name in self._metric.on}
        self._retention_evaluator = Evaluator(
            self._working,
            tokenizer,
            Evaluating(**kept),
            {name: rows for name, rows in read.items() if name in {RETAIN, *together}},
        )
        self.rows = self._evaluator.rows
        self._kept, self._kept_on = self._retention(self._working, "original")
        if math.isnan(self._kept.value):
            raise InputError(
                f"metric {self._metric}: it has no number on retain; give another --metric, such "
                "as extraction_strength"
            )
        if self._kept.value <= 0:
            raise InputError(
                f"retain: the original's {self._metric} there is {self._kept.value:.3g}, so there "
                "is nothing to keep; give rows that it knows, or another --metric, such as "
                "probability"
            )
        self._own = self._evaluator.measure(self._working, what="original")

    def _check_forget(self, sources: Mapping[str, Any], retain_model: Any) -> None:
        """Raise `InputError` where the forget data is needed and not given."""
        if sources[FORGET] is not None:
            return
        for metric in resolved_metrics(self._settings.metrics, self._settings.suite):
            if metric.on and metric.reads(FORGET):
                raise InputError(f"metric {metric}: it reads the forget data; give it (--forget)")
        if retain_model is not None:
            raise InputError(
                "retain_model: it is compared on the forget data; give that (--forget)"
            )

    @property
    def token_budget(self) -> int:
        """Tokens a batch; fewer than at first where memory ran out."""
        return min(self._evaluator.token_budget, self._retention_evaluator.token_budget)

    def loaded(self, name: str, source: Model) -> nn.Module:
        """An unlearned model; from a folder it is loaded in the original's precision.

        The model is loaded on the CPU, or shared out among ranks where the original is.
        """
        if isinstance(source, nn.Module):
            return source
        trusted = self._settings.trust_remote_code
        return load_like(source, self._original, f"unlearned {name}", trusted, whole_on="cpu")

    def of(
        self,
        methods: Mapping[str, Any],
        load: Callable[[str, Any], nn.Module],
        save: Path | None = None,
        *,
        progress: bool = False,
    ) -> xr.Dataset:
        """Find each method's `alpha`, measure its models, and return the result of `control`.

        Args:
            methods: unlearned models, or their folders, by name.
            load: makes a module of a name and its entry in `methods`.
            save: a folder for the mixed models, on the rank that writes.
            progress: show a bar.
        """
        largest: dict[str, LargestAlpha] = {}
        curves: dict[str, dict[float, Measure]] = {}
        at_alpha, as_given = [], []
        saves = self._retention_evaluator.ranks.first_of(save is not None)

        def add(name: str, source: Any) -> None:
            """Add the numbers of one method, whose models are freed at the end of this call."""
            what = f"unlearned {name}"
            unlearned = load(name, source)
            check_is_model(unlearned, what)
            mixture = Mixture(self._original, unlearned, self._working, what)
            try:
                if mixture.is_whole_in_part and self._reads_gradients:
                    raise InputError(
                        f"{what}: gradient_norm needs the gradients of two adapters, of which FSDP "
                        "shares out the first alone; leave the metric out, or merge both into "
                        "their base"
                    )
                curves[name] = {0.0: self._kept}
                largest[name] = self._largest_alpha(mixture, curves[name], name, progress)
                alpha = largest[name].alpha
                measured = {0.0: self._own}
                for each in sorted({alpha, 1.0} - {0.0}):
                    at = mixture.at(each)
                    measured[each] = self._evaluator.measure(at, what=_called(name, each))
                at_alpha.append(measured[alpha])
                as_given.append(measured[1.0]["value"])
                if saves:
                    mixture.at(alpha)
                    mixture.save(None if save is None else save / name, self._tokenizer)
            finally:
                mixture.put_back()

        for name, source in methods.items():
            add(name, source)
            if is_sharded(self._original):
                gc.collect()  # FSDP's modules hold each other
        return self._dataset(largest, curves, at_alpha, as_given)

    @property
    def _reads_gradients(self) -> bool:
        return any(not {*m.wants()}.isdisjoint(NORM_NEEDS) for m in self._evaluator.metrics)

    def _largest_alpha(
        self, mixture: Mixture, curve: dict[float, Measure], name: str, progress: bool
    ) -> LargestAlpha:
        """Find the largest `alpha` of a method; every retention measured is added to `curve`."""
        settings = self._settings
        halvings = max(0, math.ceil(math.log2(1 / settings.grid / settings.tolerance)))
        total = settings.grid + 1 + halvings
        shown = progress and self._retention_evaluator.ranks.first
        with progress_bar(shown, f"retention of {name}", total) as update:

            def kept(alpha: float) -> float:
                if alpha not in curve:
                    curve[alpha], _ = self._retention(mixture.at(alpha), _called(name, alpha))
                update(advance=1)
                return curve[alpha].value

            return largest_alpha(kept, settings.tau, settings.grid, settings.tolerance)

    def _retention(self, model: nn.Module, what: str) -> tuple[Measure, str]:
        """The retention of a model, and the set that the number is of: `all` or `retain`."""
        found = self._retention_evaluator.measure(model, what=what).isel(metric=0)
        on = ALL if ALL in found["set"].values else RETAIN
        of = found.sel(set=on)
        return Measure(*(float(of[n]) for n in ("value", "value_low", "value_high"))), on

    def _dataset(
        self,
        largest: Mapping[str, LargestAlpha],
        curves: Mapping[str, Mapping[float, Measure]],
        at_alpha: Sequence[xr.Dataset],
        as_given: Sequence[xr.DataArray],
    ) -> xr.Dataset:
        import xarray as xr

        settings = self._settings
        along = xr.DataArray(list(largest), dims="model", name="model")
        found = xr.concat(at_alpha, along, combine_attrs="override")
        alphas = sorted({alpha for curve in curves.values() for alpha in curve})
        table = np.full((3, len(largest), len(alphas)), np.nan)
        for row, curve in enumerate(curves.values()):
            for alpha, measure in curve.items():
                column = alphas.index(alpha)
                table[:, row, column] = measure.value, measure.low, measure.high
        steps = {step / settings.grid for step in range(settings.grid + 1)}
        curve_of = ("model", "alpha")
        return (
            found.assign(
                retention=(curve_of, table[0]),
                retention_low=(curve_of, table[1]),
                retention_high=(curve_of, table[2]),
                alpha_chosen=("model", [each.alpha for each in largest.values()]),
                alpha_lost=("model", [each.lost for each in largest.values()]),
                monotone=("model", [each.monotone for each in largest.values()]),
                original_value=self._own["value"],
                unlearned_value=xr.concat(as_given, along),
            )
            .assign_coords(alpha=alphas, on_grid=("alpha", [alpha in steps for alpha in alphas]))
            .assign_attrs(
                command="control",
                control=json.dumps(
                    {
                        "metric": str(self._metric),
                        "set": self._kept_on,
                        "tau": settings.tau,
                        "tolerance": settings.tolerance,
                        "grid": settings.grid,
                    }
                ),
            )
        )


def _called(name: str, alpha: float) -> str:
    """The name of a mixture with an unlearned model, for messages."""
    return f"unlearned {name}" if alpha == 1 else f"share {alpha:.3g} of unlearned {name}"


def _retention_metric(text: str) -> Any:
    """The one metric that measures retention.

    Raises:
        InputError: the text names several, or a metric that is not between 0 and 1 or has no number
            on retain.
    """
    metrics = resolved_metrics(text)
    if len(metrics) != 1:
        raise InputError(
            f"metric: {text!r} names several metrics; give one here, and the others by --metrics"
        )
    (metric,) = metrics
    if metric.within != (0.0, 1.0):
        raise InputError(
            f"metric {metric}: retention needs a metric between 0 and 1, where 1 means that all is "
            "known; give one such as extraction_strength or probability"
        )
    if not metric.reads(RETAIN):
        raise InputError(
            f"metric {metric}: it has no number on retain; give another --metric, such as "
            "extraction_strength"
        )
    return metric

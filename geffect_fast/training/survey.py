"""The survey's assessment (arXiv 2402.08787): relearning, cost, `e_u` and `e_r` beside metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from geffect_fast.arguments import checked_config
from geffect_fast.errors import InputError
from geffect_fast.evaluation_settings import EvaluateConfig, Evaluating
from geffect_fast.measure.by_config import gradient_bytes, load_by_config
from geffect_fast.measure.execute_evaluation import Evaluated, execute_evaluation, models_of
from geffect_fast.measure.models import load_model
from geffect_fast.measure.profile import profile
from geffect_fast.measure.sources import Sources, read_sources, resolved_list
from geffect_fast.objectives import parse
from geffect_fast.paths import is_there, user_path
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.registry import nearest
from geffect_fast.relearn_settings import Relearning
from geffect_fast.settings import Reading
from geffect_fast.storage.inputs import Inputs
from geffect_fast.storage.manifest import check_file
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.storage.run_folder import CONFIG, COST
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training.relearn import Relearner
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr

RELEARNED = ("probability", "extraction_strength")
"""Metrics of the rows that are measured while a model learns them again."""


@dataclass(frozen=True)
class SourceRun:
    """The run of `unlearn` that made a model.

    Attributes:
        config: config of the run.
        cost: cost of the run's updates; None for a checkpoint, and for a run that did not note it.
    """

    config: UnlearnConfig
    cost: Mapping[str, Any] | None


def source_run(source: str) -> SourceRun | None:
    """The run of `unlearn` in whose folder a model lies; None for any other model.

    Raises:
        InputError: the run's files are not as the run wrote them.
    """
    model = user_path(source)
    run = model.parent
    if not is_there(model) or not is_there(run / CONFIG):
        return None
    check_file(run, CONFIG, "put back what was there")
    config = load_config(run / CONFIG)
    if not isinstance(config, UnlearnConfig):
        return None
    cost = None
    if model.name == "model" and is_there(run / COST):
        check_file(run, COST, "put back what was there")
        cost = json.loads((run / COST).read_text(encoding="utf-8"))
    return SourceRun(config, cost)


class Survey:
    """The measures that the assessment adds to an evaluation, checked before models are loaded.

    Args:
        config: config of the evaluation.
        models: folder or hub id of each model, by its place in the result.
        progress: show bars.

    Raises:
        InputError: a setting of the relearning is unknown, or objectives are given and the original
            model is not known.
    """

    def __init__(
        self, config: EvaluateConfig, models: Mapping[str | int, str], progress: bool = False
    ) -> None:
        self._config, self._models, self._progress = config, models, progress
        self._runs = {place: source_run(source) for place, source in models.items()}
        runs = [run.config for run in self._runs.values() if run is not None]
        originals = list(dict.fromkeys(run.model for run in runs))
        self.original = config.original or (originals[0] if len(originals) == 1 else None)
        named = [*(run.objective for run in runs), *config.objectives]
        self._called = {parse(text): text for text in reversed(named)}  # the first of equal ones
        self.objectives = tuple(reversed(self._called.values()))
        self.refusals = config.refusals or next((r.refusals for r in runs if r.refusals), None)
        if config.objectives and self.original is None:
            raise InputError(
                "objectives: their effects are those at the model before unlearning, and no run "
                "says which that is; give it (--original)"
            )
        for name in config.relearn:
            if name not in _ASKED:
                raise InputError(f"relearn: unknown setting '{name}'; {nearest(name, _ASKED)}")
        self._settings(None)  # refuses wrong settings

    def added(self, dataset: xr.Dataset, evaluated: Evaluated) -> xr.Dataset:
        """The measures of an evaluation, with those that the survey asks for beside them.

        Added along the dimension of the models are `relearned`, `relearned_low`, `relearned_high`
        (also along `relearned_step`, `relearned_metric`, `relearned_set`), `seconds` and
        `peak_memory` (bytes) of the updates, `touched` (the part of the original's parameters that
        differ) and `trained_on`. Also added are `effect`, `effect_low`, `effect_high` (objective,
        risk) at the original. A value that is not known is NaN; the attribute `survey_notes`, a
        JSON list of sentences, says why.
        """
        if not set(dataset["value"].dims) & {"model", "step"}:
            dataset = dataset.expand_dims({evaluated.dimension: list(evaluated.models)})
        dimension, notes = evaluated.dimension, []
        places = list(evaluated.models)
        costs = [run.cost if run is not None else None for run in self._runs.values()]
        known = {
            name: [np.nan if cost is None or cost[name] is None else cost[name] for cost in costs]
            for name in ("seconds", "peak_memory")
        }
        unknown = (p for p, cost in zip(places, costs, strict=True) if cost is None)
        if lost := [str(p) for p in unknown if self._models[p] != self.original]:
            notes.append(
                "Time and peak memory are known only of models in folders of unlearn, so not of "
                f"{', '.join(lost)}."
            )
        if any(cost is not None and cost["device"] == "cpu" for cost in costs):
            notes.append("On a CPU the peak memory is that of the whole process.")
        ranks = here()
        touched, why = ranks.first_of(self._touched(evaluated) if ranks.first else ([], []))
        dataset = dataset.assign(
            seconds=(dimension, known["seconds"]),
            peak_memory=(dimension, known["peak_memory"]),
            touched=(dimension, touched),
        )
        relearned, relearning = self._relearned(evaluated)
        dataset = dataset.assign(relearned).assign_coords(
            trained_on=(
                dimension,
                [
                    "" if run is None else self._called[parse(run.config.objective)]
                    for run in self._runs.values()
                ],
            )
        )
        return dataset.assign(self._effects(evaluated)).assign_attrs(
            command="evaluate",
            survey_notes=json.dumps([*notes, *why]),
            original=self.original or "",
            original_place=next(
                (str(p) for p, s in self._models.items() if s == self.original), ""
            ),
            relearning=json.dumps(relearning.model_dump(mode="json", include={*_ASKED})),
        )

    def _settings(self, forget_rows: int | None) -> Relearning:
        """Settings of the relearning, from the config; defaults are cut to the rows and steps."""
        given = dict(self._config.relearn)
        if "preset" not in given:
            few = {"n_rows": min(_OWN["n_rows"], forget_rows)} if forget_rows is not None else {}
            if isinstance(steps := given.get("steps"), int):
                few["measure_every"] = max(1, min(_OWN["measure_every"], steps))
            given = few | given
        reading = {n: v for n, v in self._config.fields(Reading).items() if v is not None}
        return checked_config(Relearning, reading | {"metrics": RELEARNED} | given, "relearn")

    def _load(self, source: str, what: str) -> nn.Module:
        """Load a whole model on the CPU, on this rank alone."""
        config = self._config
        trusted = config.trust_remote_code
        return load_model(source, config.dtype, "cpu", what, trust_remote_code=trusted)

    def _touched(self, evaluated: Evaluated) -> tuple[list[float], list[str]]:
        """The part of the original's elements that differ, for each model, and notes on it."""
        if self.original is None:
            return [np.nan] * len(evaluated.models), [
                "The changed part, e_u and e_r need the model before unlearning (--original)."
            ]
        shares, said = [], []
        original = self._load(self.original, "original")
        for place, source in evaluated.models.items():
            share, adapted = part_touched(original, self._load(source, f"model {place}"))
            shares.append(share)
            if np.isnan(share):
                said.append(
                    f"{place} has other parameters than the original, so the changed part is not "
                    "known."
                )
            if adapted:
                said.append(
                    f"{place} is an adapter: its own elements are counted, relative to those of "
                    "the model."
                )
        return shares, said

    def _relearned(self, evaluated: Evaluated) -> tuple[dict[str, xr.DataArray], Relearning]:
        """Relearn with each model; return the measures step by step, and the settings."""
        forget = evaluated.sets["forget"]
        settings = self._settings(len(forget)).model_copy(
            update={"token_budget": evaluated.token_budget}
        )
        relearner = Relearner(evaluated.tokenizer, settings, forget)
        found = relearner.run(
            {str(place): source for place, source in evaluated.models.items()},
            lambda place, source: load_by_config(
                source,
                self._config,
                evaluated.device,
                relearner.beside,
                what=f"model {place}",
            ),
            progress=self._progress,
        )
        renamed = found[["value", "value_low", "value_high"]].rename(
            model=evaluated.dimension if evaluated.dimension == "model" else "place",
            step="relearned_step",
            metric="relearned_metric",
            set="relearned_set",
        )
        if evaluated.dimension == "step":
            renamed = renamed.rename(place="step").assign_coords(step=list(evaluated.models))
        renamed = renamed.drop_vars(
            ["statistic", "sample", "sample_set", "question"], errors="ignore"
        )
        measures = {name.replace("value", "relearned"): renamed[name] for name in renamed}
        return measures, settings

    def _effects(self, evaluated: Evaluated) -> dict[str, Any]:
        """`e_u` and `e_r` of the objectives at the original, with bounds.

        Empty where the original is not known, or there are no objectives.
        """
        import xarray as xr

        if self.original is None or not self.objectives:
            return {}
        names = ("forget", "retain")
        original = load_by_config(
            self.original,
            self._config,
            evaluated.device,
            partial(gradient_bytes, n_risks=len(names)),
            what="original",
        )
        result = profile(
            original,
            evaluated.tokenizer,
            **{name: evaluated.sets[name] for name in names},
            objectives=list(self.objectives),
            refusals=self.refusals,
            resolve=("sample",),
            norms=False,
            **self._config.fields(Reading) | {"token_budget": evaluated.token_budget},
        )
        total = result["g_effect"].sum("sample").transpose("objective", "risk")
        along = {"objective": list(map(str, result["objective"].values)), "risk": ["e_u", "e_r"]}
        values = {"effect": total.values}
        for bound in ("low", "high"):
            held = result.get(f"g_effect_{bound}")
            values[f"effect_{bound}"] = (
                np.full(total.shape, np.nan) if held is None else held.transpose(*total.dims).values
            )
        return {
            name: xr.DataArray(value, along, ("objective", "risk"))
            for name, value in values.items()
        }


_OWN = {name: Relearning.model_fields[name].default for name in ("n_rows", "measure_every")}

_ASKED = sorted({*Relearning.model_fields} - {*Evaluating.model_fields} | {"max_length"})
"""Settings of the relearning that can be given (`--relearn`)."""


def part_touched(original: nn.Module, unlearned: nn.Module) -> tuple[float, bool]:
    """The part of a model's parameters, by elements, that differ from the original's.

    Tied weights count once. The original is rounded to the precision of the unlearned model before
    they are compared. For an adapter, the part is the number of the adapter's own elements over
    the number of the original's.

    Returns:
        The part, NaN where the two models have different parameters; and whether the unlearned
        model is an adapter.
    """
    before = dict(original.named_parameters())
    total = sum(p.numel() for p in before.values())
    if hasattr(unlearned, "peft_config"):
        added = [p for name, p in unlearned.named_parameters() if "lora_" in name]
        return sum(p.numel() for p in added) / total, True
    now = dict(unlearned.named_parameters())
    if {n: p.shape for n, p in before.items()} != {n: p.shape for n, p in now.items()}:
        return float("nan"), False
    changed = sum(int((before[n].to(p.dtype) != p).sum()) for n, p in now.items())
    return changed / total, False


@on_all_ranks
def execute_survey(
    config: EvaluateConfig,
    out: str | Path,
    *,
    progress: bool = False,
    inputs: Inputs = MappingProxyType({}),
    **more: Any,
) -> xr.Dataset:
    """Execute an evaluation as `execute_evaluation` does, and add the survey's measures.

    `Survey.added` names the measures that are added.
    """
    _, models, _ = models_of(config)
    survey = Survey(config, models, progress)
    if survey.original is not None:
        check_model_source(survey.original, "original", config.trust_remote_code)
        named = Sources.of(config.forget, config.retain, None, survey.refusals)
        # An objective that lacks data is refused before models are loaded.
        read_sources(named, resolved_list(survey.objectives or ("ga",)), config.data_format)
    found = {"original": survey.original, "refusals": survey.refusals}
    return execute_evaluation(
        config.model_copy(update=found),
        out,
        progress=progress,
        inputs=inputs,
        assess=survey.added,
        **more,
    )

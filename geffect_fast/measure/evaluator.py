"""Measures of models on data sets: rows are read and tokenised once, models measured repeatedly."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.capture.compat import (
    check_is_model,
    check_replicas,
    is_sharded,
    table_of_positions,
    vocabulary_size,
)
from geffect_fast.capture.modes import evaluating
from geffect_fast.capture.shards import at_work
from geffect_fast.data import (
    Sample,
    SampleSet,
    estimate_token_budget,
    tokenize_choices,
    tokenize_rows,
)
from geffect_fast.data.row_kinds import CALLED, RowKind
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.evaluation_settings import Evaluating
from geffect_fast.measure.memory import within_budget
from geffect_fast.measure.models import load_like
from geffect_fast.measure.precision import dtype_name
from geffect_fast.measure.prepare import check_model
from geffect_fast.measure.sources import Sources, read_sets
from geffect_fast.metrics.base import ALL, FORGET, HOLDOUT, Metric, Seen
from geffect_fast.metrics.dataset import measures_dataset
from geffect_fast.metrics.observe import answers_scored, n_tokens, observe
from geffect_fast.metrics.observed import Observed, read_log, required
from geffect_fast.metrics.registry import resolved_metrics
from geffect_fast.metrics.rows import DataRows, check_examples, kind_of, metric_rows
from geffect_fast.ranks import here
from geffect_fast.results.dataset import digest, digests
from geffect_fast.terminal import progress_bar

if TYPE_CHECKING:
    import xarray as xr

Model = nn.Module | str | Path


def checked_probes(probes: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Further data sets by name.

    Raises:
        InputError: a name is taken, or `probes` is no mapping.
    """
    Sources.of(None, None, probes, None)
    for name in probes or {}:
        if name in (HOLDOUT, ALL):
            raise InputError(f"probes: the name '{name}' is taken; choose another")
    return probes or {}


class Evaluator:
    """Measures models one after another, on data sets, metrics and compared models prepared once.

    Within a process group of several ranks (`geffect_fast.ranks`) an evaluator is made and called
    on all ranks, which share out the rows.

    Args:
        model: the first model to be measured; others must have its vocabulary.
        tokenizer: as for `evaluate`.
        settings: what is measured.
        sources: data sets by name, `forget`, `retain` and any others; None is left out.
        reference_model, retain_model: as for `evaluate`.

    Attributes:
        ranks: the ranks that share the rows.
        rows: digests of the tokenised rows, by set.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: Evaluating,
        sources: Mapping[str, Any],
        reference_model: Model | None = None,
        retain_model: Model | None = None,
    ) -> None:
        check_is_model(model)
        self.ranks = here()
        self.metrics = resolved_metrics(settings.metrics, settings.suite)
        given = {name: source for name, source in sources.items() if source is not None}
        needs = {need for metric in self.metrics for need in metric.wants()}
        self._check_given(needs, given, reference_model, retain_model)
        self._settings, self._tokenizer = settings, tokenizer
        self._first, self._vocabulary = weakref.ref(model), vocabulary_size(model)
        read = read_sets(given, settings.data_format)
        kinds = {name: kind_of(rows) for name, rows in read.items()}
        check_examples(kinds)
        self._tell_unread(kinds)
        reading = {
            name: [m for m in self.metrics if m.reads(name) and m.reads_rows(kind)]
            for name, kind in kinds.items()
        }
        self.needs = {
            name: {need for metric in of for need in metric.wants()} for name, of in reading.items()
        }
        self._lengths = {
            name: {metric.most_written() for metric in of if "written" in metric.wants()}
            for name, of in reading.items()
        }
        self._positions = table_of_positions(model)
        self.sets = {
            name: metric_rows(
                rows,
                name,
                reading[name],
                self.needs[name],
                self._tokenize,
                self._tokenize_choices,
            )
            for name, rows in read.items()
        }
        if tokenizer is None:
            _check_reads_no_text(reading)
        self.rows = digests({name: rows.answers for name, rows in self.sets.items()})
        self._check(model, "model")
        self._reference: dict[str, Any] = {}
        self._retrained: dict[str, Observed] = {}
        with self._together(model):
            self.ranks.check_same(self._arguments_in_words(reference_model, retain_model))
            self._budget = TokenBudget(settings.token_budget or self._tokens_that_fit(model))
            self._agree_on_budget()
            if "reference" in needs and reference_model is not None:
                self._reference = self._scored_by(reference_model, model)
            if retain_model is not None and "retain_model" in needs | self._uses_if_given():
                self._retrained = self._seen_of_retrained(retain_model, model)
            if is_sharded(model):
                gc.collect()  # FSDP's modules hold each other

    def measure(
        self, model: nn.Module, *, progress: bool = False, what: str = "model"
    ) -> xr.Dataset:
        """Measure a model, and return its measures as `evaluate` does.

        Args:
            model: the first model, or another with the same vocabulary.
            progress: show a bar.
            what: the model's name in messages.
        """
        with self._together(model):
            # A metric may draw random numbers; the first rank's result holds for all ranks.
            return self.ranks.first_of(self._measures(model, progress, what))

    @contextmanager
    def _together(self, model: nn.Module) -> Iterator[None]:
        """Work on a model that all ranks begin and end together, in step where it is shared out."""
        with (
            self.ranks.together("evaluate"),
            self.ranks.in_step(self.ranks.size > 1 and is_sharded(model)),
            at_work(model),
        ):
            yield

    def _measures(self, model: nn.Module, progress: bool, what: str) -> xr.Dataset:
        if model is not self._first():
            self._check(model, what)
        check_replicas(model, self.ranks, what)
        n = n_tokens(self.sets, self.needs) / self.ranks.size
        with (
            evaluating(model),
            within_budget(self._budget),
            progress_bar(progress, f"measures of the {what}", n) as update,
        ):
            seen = self._observed(model, self.sets, self.needs, what, lambda k: update(advance=k))
        self._agree_on_budget()
        for name, scored in self._reference.items():
            seen[name] = replace(seen[name], reference=scored)
        every = Seen(seen, self._retrained)
        return measures_dataset(
            self.metrics,
            [metric.measures(every) for metric in self.metrics],
            self.sets,
            seen,
            {
                "suite": self._settings.suite or "",
                "max_new_tokens": self._settings.max_new_tokens,
                "token_budget": self.token_budget,
                "date": self._settings.date,
                "digests": json.dumps(self.rows),
                "dtype": dtype_name(next(model.parameters()).dtype),
            },
        )

    @property
    def token_budget(self) -> int:
        """Tokens a batch; fewer than at first where memory ran out."""
        return self._budget.tokens

    def _agree_on_budget(self) -> None:
        """Set the token budget to the smallest of all ranks."""
        self._budget.tokens = min(self.ranks.meet(self._budget.tokens))

    def _arguments_in_words(self, *compared: Model | None) -> dict[str, Any]:
        """Descriptions of all arguments that must be the same on all ranks, by argument name."""
        named = [type(m).__name__ if isinstance(m, nn.Module) else str(m) for m in compared]
        rows: dict[str, Any] = {}
        for name, of in self.sets.items():
            samples = (sample for each in of.every_set() for sample in each.samples)
            every = (q for sample in samples for qs in sample.sequences().values() for q in qs)
            found = digest(SampleSet(name, tuple(Sample(0, "", q) for q in every)))
            rows[name] = f"{len(of)} rows of digest {found}"
        return {
            "probes": ", ".join(rows),
            **rows,
            **dict(zip(("reference_model", "retain_model"), named, strict=True)),
            **{name: str(value) for name, value in self._settings},
        }

    def _check_given(
        self, needs: set[Any], sources: Mapping[str, Any], reference: Any, retrained: Any
    ) -> None:
        """Raise `InputError` where a metric needs hold-out data or a model that is not given."""
        for need, there, what in (
            (
                HOLDOUT,
                HOLDOUT in sources,
                "hold-out data (--holdout FILE); give rows that no model was trained on",
            ),
            (
                "reference",
                reference is not None,
                "a reference model (--reference MODEL); give one, as reference_model",
            ),
            (
                "retain_model",
                retrained is not None,
                "a model trained without the forget rows (--retain-model MODEL); give one, or its "
                "log",
            ),
        ):
            if need in needs and not there:
                metric = next(m for m in self.metrics if need in m.wants())
                raise InputError(f"metric {metric} needs {what}")

    def _tell_unread(self, kinds: Mapping[str, RowKind]) -> None:
        """Warn, in a line for each metric, of sets whose kind of rows the metric does not read."""
        for metric in self.metrics:
            others = [
                name
                for name, kind in kinds.items()
                if metric.reads(name) and not metric.reads_rows(kind)
            ]
            if others:
                read = " or ".join(CALLED[kind] for kind in metric.kinds)
                warnings.warn(
                    f"metric {metric} reads {read}, so that it has no number of "
                    f"{', '.join(others)}",
                    GEffectWarning,
                    stacklevel=2,
                )

    def _uses_if_given(self) -> set[str]:
        """Needs that are met only where a model is given: privleak's model, which has a default."""
        return {"retain_model"} if any(m.name == "privleak" for m in self.metrics) else set()

    def _sets_with(self, need: str) -> dict[str, DataRows]:
        return {name: rows for name, rows in self.sets.items() if need in self.needs[name]}

    def _tokenize(self, rows: Sequence[Mapping[str, Any]], name: str) -> SampleSet:
        return tokenize_rows(
            rows,
            self._tokenizer,
            name=name,
            template=self._settings.template,
            max_length=self._settings.max_length,
            date=self._settings.date,
            n_positions=self._positions,
        )

    def _tokenize_choices(self, rows: Sequence[Mapping[str, Any]], name: str) -> SampleSet:
        return tokenize_choices(
            rows,
            self._tokenizer,
            name=name,
            template=self._settings.template,
            max_length=self._settings.max_length,
            date=self._settings.date,
        )

    def _check(self, model: nn.Module, what: str) -> None:
        """Refuse a model that holds NaN, or does not go with the rows or the first model.

        Raises:
            InputError: as `check_model`, or another vocabulary than the first model's, or FSDP
                shares out the model and this rank is alone.
            NonFiniteError: a weight is not finite.
        """
        if is_sharded(model) and self.ranks.size == 1:
            raise InputError(f"{what}: FSDP shares it out; evaluate it on all of its ranks")
        own, first = vocabulary_size(model), self._vocabulary
        if own != first:
            raise InputError(
                f"{what}: its vocabulary has {own} tokens and the first model's {first}; evaluate "
                "models of different vocabularies apart, each with its own tokenizer"
            )
        numbered = enumerate(s for rows in self.sets.values() for s in rows.every_set())
        check_model(model, {str(i): each for i, each in numbered}, what)

    def _tokens_that_fit(self, model: nn.Module) -> int:
        logits = any("distribution" in needs for needs in self.needs.values())
        return estimate_token_budget(model, n_directions=0, logits=logits)

    def _loaded(self, source: Model, what: str, model: nn.Module) -> nn.Module:
        """A further model; a folder is loaded in the precision and on the device of `model`."""
        trusted = self._settings.trust_remote_code
        loaded = (
            source if isinstance(source, nn.Module) else load_like(source, model, what, trusted)
        )
        if is_sharded(loaded) != is_sharded(model):
            raise InputError(
                f"{what}: FSDP shares out one of the models that are compared, and not the other; "
                "give both alike"
            )
        self._check(loaded, what)
        check_replicas(loaded, self.ranks, what)
        return loaded

    def _scored_by(self, source: Model, first: nn.Module) -> dict[str, Any]:
        """The reference model's scores of the answers that metrics compare, by data set."""
        other = self._loaded(source, "reference_model", first)
        read, ranks = self._sets_with("reference"), self.ranks
        with evaluating(other), within_budget(self._budget), at_work(other):
            return answers_scored(other, read, self._budget, "reference model", ranks)

    def _observed(
        self,
        model: nn.Module,
        sets: Mapping[str, DataRows],
        needs: Mapping[str, set[Any]],
        what: str,
        tick: Any = lambda _: None,
    ) -> dict[str, Observed]:
        return observe(
            model,
            sets,
            needs,
            self._tokenizer,
            self._budget,
            self._settings.max_new_tokens,
            lengths={name: self._lengths[name] for name in sets if "written" in needs[name]},
            what=what,
            tick=tick,
            ranks=self.ranks,
        )

    def _seen_of_retrained(self, source: Model, first: nn.Module) -> dict[str, Observed]:
        """The observations of the model trained without the forget rows, made now or from its log.

        Raises:
            InputError: a log is of other forget rows, or `privleak` would need the model itself.
        """
        if not isinstance(source, nn.Module) and str(source).endswith(".json"):
            if self._uses_if_given():
                raise InputError(
                    "metric privleak: a log holds no token's probability; give the retain_model "
                    "itself"
                )
            found = read_log(source)
            self._check_split(found.get(FORGET), source)
            return found
        model = self._loaded(source, "retain_model", first)
        wanted = {"paraphrases", "perturbed"}
        needs: dict[str, set[Any]] = {FORGET: self.needs[FORGET] & wanted}
        if self._uses_if_given():
            needs[HOLDOUT] = set()
        sets = {name: self.sets[name] for name in needs}
        with evaluating(model), within_budget(self._budget), at_work(model):
            return self._observed(model, sets, needs, "retain_model")

    def _check_split(self, log: Observed | None, source: str | Path) -> None:
        """Raise `InputError` where a saved log is of other forget rows than those given."""
        questions = self.sets[FORGET].answers.questions
        n = 0 if log is None else len(required(log.paraphrases))
        if log is None or n != len(questions):
            raise InputError(
                f"retain_model: log {source} is of {n} forget rows, and there are "
                f"{len(questions)}; give the log of the same split"
            )
        for row, (question, prompt) in enumerate(zip(questions, log.prompts or (), strict=False)):
            if question.strip() not in prompt:
                raise InputError(
                    f"retain_model: row {row} of log {source} is not the question of forget row "
                    f"{row}; give the log of the same split"
                )


def _check_reads_no_text(reading: Mapping[str, Sequence[Metric]]) -> None:
    """Raise `InputError` where a metric reads text, which takes a tokenizer."""
    for name, metrics in reading.items():
        for metric in metrics:
            if metric.wants() & {"texts", "continuations", "written"}:
                raise InputError(
                    f"{name}: metric {metric} reads text, for which tokenised rows need a "
                    "tokenizer; give one (--tokenizer), or leave the metric out"
                )

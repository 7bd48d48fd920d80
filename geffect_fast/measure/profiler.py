"""A profile in two steps: what is prepared once, and what is measured of the model as it stands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect_fast.arguments import checked_config
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import check_finite
from geffect_fast.data import Layout, SampleSet, estimate_token_budget, make_batches
from geffect_fast.data.batch import Batch, Role
from geffect_fast.engines.batches import DataPass, Tick, TokenBudget, mixture_of, passes_for
from geffect_fast.engines.choice import Choice, choose_engine
from geffect_fast.engines.directions import accumulate_gradients, place_for_directions
from geffect_fast.engines.forward import moves_for
from geffect_fast.engines.forward_check import forward_mode_problem
from geffect_fast.engines.known_models import choose_layout, own_loss
from geffect_fast.engines.layout import check_reference, longest_sequence
from geffect_fast.engines.model_outputs import splits_attention
from geffect_fast.engines.reference import Reference
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.measure.effects import find_effects
from geffect_fast.measure.memory import check_memory, within_budget
from geffect_fast.measure.prepare import Prepared, Sources, needs_of, prepare, resolved_list
from geffect_fast.measure.rounding import HALF, RoundingCheck
from geffect_fast.objectives import Objective
from geffect_fast.results.axes import Resolution, by_row
from geffect_fast.results.dataset import (
    check_coverage,
    check_directions,
    check_effects,
    check_norms,
    dataset,
    digests,
    gram_matrices,
)
from geffect_fast.results.groups import checked_blocks
from geffect_fast.results.intervals import LEVEL
from geffect_fast.results.risk_rows import RiskRows, RowValues
from geffect_fast.results.token_weights import ObjectiveWeights
from geffect_fast.settings import Measuring
from geffect_fast.storage.stream import EffectFile
from geffect_fast.terminal import progress_bar

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Measurement:
    """What was measured of a model.

    Attributes:
        dataset: as `geffect_fast.profile` returns it.
        directions: the gradients of the risks by parameter, `(M, *shape)`, fp32 (fp64 of fp64
            models), in the order of `Profiler.risk_names`.
    """

    dataset: xr.Dataset
    directions: dict[str, Tensor]


class Profiler:
    """Batches and engine of a profile, decided once; the model's weights may change.

    A reference model that is given is read at the first measurement, and stays what it was then;
    without one, the reference is the model as it stands at each.

    Args:
        prepared: the model, its data and objectives, and what to measure.

    Attributes:
        plan: of the model, which must stay in eval mode while it is measured.
        sets: the data sets, tokenised: `forget`, `retain` and every probe by its name.
        objectives: the objectives.
        risk_names: names along the axis `risk`.
        own_loss: how the model's own loss differs from the risk; None: not.

    Example:
        >>> profiler = Profiler.of(model, tokenizer, forget=rows, retain=others, objectives=["ga"])
        >>> before = profiler.measure().dataset
        >>> ...  # a training step
        >>> after = profiler.measure().dataset
    """

    def __init__(self, prepared: Prepared[Measuring]) -> None:
        settings, model, sets = prepared.settings, prepared.model, prepared.sets
        axes, reduction = settings.resolve, settings.reduction
        if not {"parameter", "group"} & set(axes) and settings.groups:
            raise InputError("groups: goes with resolve by 'group' or 'parameter'; leave it out")
        self.objectives, self.sets = prepared.objectives, sets
        self._parts = prepared.parts
        risk = settings.risk_objective
        self.plan = plan = Plan.of(model)
        uses_retain = any(part.on == "retain" for part in self._parts)
        self._resolution = resolution = Resolution(
            axes,
            list(plan.parameters),
            {name: sets[name] for name in ("forget", "retain")[: 1 + uses_retain]},
            prepared.reads_alternatives,
            checked_blocks(settings.groups or None, list(plan.parameters)),
        )
        sources = {"unlearn": "forget"} | {name: name for name in sets if name != "forget"}
        self.risk_names = list(sources)
        columns = resolution.columns()[1]
        choice = choose_engine(
            settings.engine,
            axes,
            settings.norms,
            n_risks=len(sources),
            n_parts=len(self._parts),
            shares=plan.product_shares(columns),
        )
        self._budget = budget = TokenBudget(settings.token_budget or 1)
        longest = max(map(longest_sequence, sets.values()))
        try:
            with within_budget(budget, one_sample=True):
                layout = choose_layout(plan, sets["forget"], longest)
        except UnsupportedModelError:
            # Whole gradients and forward passes need no shares of samples, only that samples do
            # not meet.
            if resolution.per_sample and choice.engine == "reverse":
                raise
            layout = "single"
        with within_budget(budget, one_sample=True):
            self.own_loss = own_loss(plan, sets["forget"])
        self._choice = self._possible(choice, layout, settings.engine == "forward")
        by_reverse = self._choice.engine == "reverse"
        self._norms = by_reverse if settings.norms is None else settings.norms
        if settings.token_budget is None:
            budget.tokens = self._tokens_that_fit(layout)

        def batches_of(sample_set: SampleSet, wanted: tuple[Role, ...]) -> list[Batch]:
            return make_batches(
                sample_set,
                wanted,
                token_budget=budget.tokens,
                reduction=reduction,
                layout=layout,
            )

        def passes_on(
            sets: Mapping[str, SampleSet], budget: TokenBudget | None = None
        ) -> list[DataPass]:
            return passes_for(
                self._parts,
                lambda name, wanted: batches_of(sets[name], wanted),
                {"forget": 0, "retain": len(sets["forget"])},
                budget,
            )

        self._passes = passes_on(sets, budget)
        self._risk_passes = [
            DataPass(batches_of(sets[source], risk.roles), {m: risk}, budget=budget)
            for m, source in enumerate(sources.values())
        ]
        self._risk_rows = None
        if "sample" in axes:
            sizes = {risk: len(sets[source]) for risk, source in sources.items()}
            self._risk_rows = RiskRows(sizes, adds_up=reduction == "sum")
        self._rounding = None
        if any(p.dtype in HALF for p in plan.model.parameters()):
            engine = self._choice.engine
            self._rounding = RoundingCheck.of(engine, resolution, self._mixture, passes_on)
        self._tokenizer = prepared.tokenizer
        self._attributes = {
            "engine": self._choice.engine,
            "engine_reason": self._choice.reason,
            "layout": layout,
            "reduction": reduction,
            "risk": str(risk),
            "n_forget": len(sets["forget"]),
            "n_retain": len(sets["retain"]),
            "date": settings.date,
            "digests": json.dumps(digests(sets)),
            "objectives": json.dumps(
                [{"name": o.name, "parameters": o.parameters()} for o in self.objectives]
            ),
        }
        if self.own_loss is not None:
            self._attributes |= self.own_loss.attributes()
        reference = prepared.reference
        if reference is not None:
            with within_budget(budget, one_sample=True):
                check_reference(reference, layout, sets["forget"], longest)
        self._reference_is_model: bool | None = False
        if prepared.compares:  # other weights may compute the same, as a new adapter does
            self._reference_is_model = True if reference is None else None
        self._one_row = passes_on({name: rows.part([0]) for name, rows in sets.items()})
        self._reference = Reference(reference)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        forget: Any,
        retain: Any,
        objectives: Sequence[str | Objective] | str,
        probes: Mapping[str, Any] | None = None,
        refusals: Any = None,
        reference_model: nn.Module | str | Path | None = None,
        **settings: Any,
    ) -> Profiler:
        """A profiler of what `geffect_fast.profile` takes; raises what it does."""
        return cls(
            prepare(
                model,
                tokenizer,
                Sources.of(forget, retain, probes, refusals),
                resolved_list(objectives),
                checked_config(Measuring, settings),
                reference_model,
            )
        )

    def measure(
        self,
        *,
        out: str | Path | None = None,
        weights: bool = False,
        progress: bool = False,
        unchanged: bool = False,
        rounding: bool = True,
    ) -> Measurement:
        """Measure the model as it is now.

        Args:
            out: as `geffect_fast.profile` takes it.
            weights: also `token_weight` (objective, sample, token): the derivative of an objective
                by the log-probability of each label, NaN where it has none; left out with
                `position`.
            progress: show bars.
            unchanged: the weights are still those that were searched for NaN when this was made,
                and need not be again.
            rounding: of a 16-bit model also how far its effects can be trusted, as
                `geffect_fast.profile` says it.

        Raises:
            InputError: the result does not fit in memory, or `out` is of no use.
            NonFiniteError: a weight, gradient or effect is not finite; the first is named.
            UnsupportedModelError: the samples' shares miss a gradient.
        """
        plan, resolution, mixture = self.plan, self._resolution, self._mixture
        if not unchanged:
            check_finite(plan.model)
        m, k, engine = len(self.risk_names), len(self.objectives), self._choice.engine
        shape = resolution.shape(k, m)
        if out is not None and not ("sample" in resolution.axes and resolution.within):
            raise InputError(
                "out: goes with resolve by 'sample' and 'position' or 'token'; leave it out"
            )
        whole = self._norms or not resolution.per_sample
        device = next(iter(plan.parameters.values())).device
        n_elements = sum(p.numel() for p in plan.parameters.values())
        check_memory(len(self._parts) if whole else 0, n_elements, device, shape, out)
        watched = None if self._risk_rows is None else self._risk_rows.watch()
        risk_values, directions = self.risk_gradients(progress=progress, watched=watched)
        moves = moves_for(plan, resolution.columns()[1], m) if engine == "forward" else []
        weights = weights and resolution.within != "position"
        by_token = ObjectiveWeights(resolution, mixture) if weights else None
        passes = self._passes
        if by_token is not None:
            passes = [replace(data_pass, watch=by_token.add) for data_pass in passes]
        with (
            nullcontext(np.zeros(shape)) if out is None else EffectFile(out, resolution.dims, shape)
        ) as array:
            what, n_passes = "effects of the objectives", max(len(moves), 1)
            with self._ticking(progress, what, passes, n_passes) as tick:
                if self._reference_is_model is None and unchanged:
                    # Models that differ do so at the first row.
                    same = self._reference.is_computed_by
                    self._reference_is_model = all(
                        same(plan.model, each, device) for each in (self._one_row, passes)
                    )
                checked = self._rounding.passes if self._rounding is not None else []
                self._reference.prepare([*passes, *checked], device)
                found = find_effects(
                    engine,
                    plan,
                    passes,
                    directions,
                    self._reference,
                    mixture,
                    resolution,
                    array,
                    moves=moves,
                    norms=self._norms,
                    tick=tick,
                )
            check_effects(found.summed, found.values, self._parts, found.places)
            mixed = torch.tensordot(mixture, found.summed, dims=1)
            check_effects(mixed, mixture @ found.values, self.objectives, found.places)
            gram, of_objectives = found.gram, engine == "reverse"
            if resolution.per_sample and of_objectives and gram is not None:
                check_coverage(plan, found.summed, gram, m)
            if gram is not None:
                onto = torch.eye(m, dtype=torch.float64)
                onto = torch.block_diag(onto, mixture) if of_objectives else onto
                gram = onto @ gram @ onto.T
                check_norms(gram, [*self.risk_names, *self.objectives])
            attributes = self.attributes | {
                "dtype": str(next(iter(plan.parameters.values())).dtype).removeprefix("torch."),
                **plan.coverage().attributes(),
                # NetCDF has no booleans
                "coverage_checked": int(of_objectives and gram is not None),
            }
            if unchanged and self._reference_is_model:
                attributes["reference_is_model"] = 1
            if self._rounding is not None and rounding:
                every_row = None
                if isinstance(array, np.ndarray) and "sample" in resolution.axes:
                    every_row = by_row(array)
                attributes |= self._rounding.attributes(
                    plan, directions, self._reference, every_row
                )
            result = dataset(
                resolution,
                None if isinstance(array, EffectFile) else array,
                [str(o) for o in self.objectives],
                self.risk_names,
                risk_values,
                mixture @ found.values,
                gram if self._norms or not of_objectives else None,
                self._tokenizer,
                attributes,
            )
            if self._risk_rows is not None and watched is not None:
                of_risks = gram_matrices(directions) if gram is None else gram
                square = float(of_risks[:, 0, 0].sum())
                found_rows = self._risk_rows.variables(
                    by_row(array), resolution.set_names, watched, risk_values, square
                )
                result = result.assign(found_rows).assign_attrs(interval_level=LEVEL)
            if by_token is not None:
                variables, coordinates = by_token.variables(self._tokenizer)
                result = result.assign(variables).assign_coords(coordinates)
            if isinstance(array, EffectFile):
                result = array.finish(result)
        return Measurement(result, directions)

    def risk_gradients(
        self, *, progress: bool = False, watched: RowValues | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values of the risks `(M,)` fp64 and their gradients, as `Measurement.directions`.

        Args:
            progress: show a bar.
            watched: told of what every row adds to the risks.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        n = len(self.risk_names)
        place = place_for_directions(self.plan, n) if self._choice.engine == "forward" else None
        passes = self._risk_passes
        if watched is not None:
            passes = [replace(data_pass, watch=watched.add) for data_pass in passes]
        with self._ticking(progress, "gradients of the risks", passes) as tick:
            values, directions = accumulate_gradients(
                self.plan,
                passes,
                n,
                self._reference,
                tick,
                place,
                None if watched is None else watched.products,
            )
        check_directions(directions, self.risk_names)
        return values, directions

    @property
    def token_budget(self) -> int:
        """Tokens a batch; where memory ran out, less than it was."""
        return self._budget.tokens

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of results that hold for all measurements, as they are now."""
        return self._attributes | {"token_budget": self.token_budget}

    @property
    def _mixture(self) -> Tensor:
        return mixture_of(self.objectives, self._parts)

    def _possible(self, choice: Choice, layout: Layout, asked: bool) -> Choice:
        """The engine chosen, or reverse where forward mode cannot pass the model.

        Raises:
            UnsupportedModelError: it cannot, and what is wanted needs it.
        """
        if choice.engine == "reverse":
            return choice
        problem = forward_mode_problem(self.plan, self.sets["forget"], layout)
        if problem is None:
            return choice
        if asked or self._resolution.within is not None:
            raise UnsupportedModelError(
                f"engine forward: {problem}; use engine='reverse', without 'token'"
            )
        return Choice("reverse", problem)

    def _tokens_that_fit(self, layout: Layout) -> int:
        """Tokens a batch, from what they take and the memory that is free."""
        model, forward = self.plan.model, self._choice.engine == "forward"
        whole = not forward and (self._norms or not self._resolution.per_sample)
        needs = needs_of(self._parts)
        (largest, *_) = make_batches(
            self.sets["forget"], ("answer",), token_budget=2**62, layout=layout
        )
        read = Counter((part.on, frozenset(part.roles)) for part in self._parts)
        predicted = [
            each.totals().n_targets["answer"] / sum(len(s.answer) for s in each.samples)
            for each in self.sets.values()
        ]
        return estimate_token_budget(
            model,
            n_directions=len(self.risk_names),
            n_gradients=len(self._parts) if whole else 0,
            shared=not forward and max(read.values()) > 1,
            forward=forward,
            logits=not {"logits", "reference_logits"}.isdisjoint(needs),
            predicted=max(predicted),
            by_sample=layout != "packed" or splits_attention(model, largest),
        )

    @contextmanager
    def _ticking(
        self, show: bool, what: str, passes: Sequence[DataPass], n_passes: int = 1
    ) -> Iterator[Tick]:
        """Yields a function that is told of tokens done, drawn as a bar; memory may run out."""
        with (
            progress_bar(
                show, what, n_passes * sum(data_pass.n_tokens for data_pass in passes)
            ) as update,
            within_budget(self._budget),
        ):
            yield lambda n: update(advance=n)

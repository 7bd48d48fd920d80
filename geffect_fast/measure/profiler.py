"""A profile in two steps: what is prepared once, and what is measured of the model as it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect_fast.arguments import checked_config
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import check_finite
from geffect_fast.data import Layout, SampleSet, estimate_token_budget, make_batches
from geffect_fast.engines.batches import DataPass, Tick, TokenBudget, mixture_of, passes_for
from geffect_fast.engines.choice import Choice, choose_engine
from geffect_fast.engines.directions import (
    accumulate_gradients,
    fisher_traces,
    place_for_directions,
)
from geffect_fast.engines.forward import moves_for
from geffect_fast.engines.forward_check import forward_mode_problem
from geffect_fast.engines.known_models import choose_layout, own_loss
from geffect_fast.engines.layout import check_reference, longest_sequence
from geffect_fast.engines.model_outputs import splits_attention
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.second_order import check_twice_differentiable, curvature_along
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.measure.beside_effects import (
    check_second_order,
    conflict_variables,
    effects_beside,
    gradient_masses,
    second_order_variables,
)
from geffect_fast.measure.effects import Effects, find_effects, mixed_gradients
from geffect_fast.measure.memory import check_memory, within_budget
from geffect_fast.measure.prepare import Prepared, Sources, needs_of, prepare, resolved_list
from geffect_fast.measure.rounding import HALF, RoundingCheck
from geffect_fast.measure.step_metric import NextStep, StepMetric
from geffect_fast.objectives import Objective
from geffect_fast.ops.ieee_fp32 import ieee_fp32
from geffect_fast.results.axes import Resolution, by_row
from geffect_fast.results.dataset import (
    check_gradients,
    dataset,
    gram_matrices,
)
from geffect_fast.results.groups import checked_blocks
from geffect_fast.results.intervals import LEVEL
from geffect_fast.results.risk_rows import UNLEARN, RiskRows, RowValues
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

    @ieee_fp32()
    def __init__(self, prepared: Prepared[Measuring]) -> None:
        settings, sets = prepared.settings, prepared.sets
        if not {"parameter", "group"} & set(settings.resolve) and settings.groups:
            raise InputError("groups: goes with resolve by 'group' or 'parameter'; leave it out")
        self.objectives, self.sets = prepared.objectives, sets
        self.plan = plan = Plan.of(prepared.model)
        self._parts, self._tokenizer = prepared.parts, prepared.tokenizer
        self._mixture = mixture_of(self.objectives, self._parts)
        uses_retain = any(part.on == "retain" for part in self._parts)
        self._resolution = Resolution(
            settings.resolve,
            list(plan.parameters),
            {name: sets[name] for name in ("forget", "retain")[: 1 + uses_retain]},
            prepared.reads_alternatives,
            checked_blocks(settings.groups or None, list(plan.parameters)),
        )
        self._sets_of_risks = {UNLEARN: "forget"} | {n: n for n in sets if n != "forget"}
        self.risk_names = list(self._sets_of_risks)
        self._token_budget = TokenBudget(settings.token_budget or 1)
        self._look_at_the_model(prepared)
        if settings.token_budget is None:
            self._token_budget.tokens = self._tokens_that_fit()
        self._divide_into_batches(settings)
        self._attributes = {
            "engine": self._choice.engine,
            "engine_reason": self._choice.reason,
            "layout": self._layout,
            "reduction": settings.reduction,
            "risk": str(settings.risk_objective),
            **prepared.attributes(),
        }
        if self.own_loss is not None:
            self._attributes |= self.own_loss.attributes()
        self._reference = Reference(prepared.reference)
        self._reference_is_model: bool | None = False
        if prepared.compares:  # other weights may compute the same, as a new adapter does
            self._reference_is_model = True if prepared.reference is None else None

    def _look_at_the_model(self, prepared: Prepared[Measuring]) -> None:
        """Choose layout and engine, and compare the model's own loss with the risk."""
        settings, plan, forget = prepared.settings, self.plan, self.sets["forget"]
        choice = choose_engine(
            settings.engine,
            settings.resolve,
            settings.norms,
            n_risks=len(self.risk_names),
            n_parts=len(self._parts),
            shares=plan.product_shares(self._resolution.columns()[1]),
        )
        longest = max(map(longest_sequence, self.sets.values()))
        with within_budget(self._token_budget, one_sample=True):
            try:
                self._layout: Layout = choose_layout(plan, forget, longest)
            except UnsupportedModelError:
                # Whole gradients and forward passes need no shares of samples, only that samples
                # do not meet.
                if self._resolution.per_sample and choice.engine == "reverse":
                    raise
                self._layout = "single"
            self.own_loss = own_loss(plan, forget)
        self._choice = self._possible(choice, settings.engine == "forward")
        by_reverse = self._choice.engine == "reverse"
        self._norms = by_reverse if settings.norms is None else settings.norms
        if prepared.reference is not None:
            with within_budget(self._token_budget, one_sample=True):
                check_reference(prepared.reference, self._layout, forget, longest)

    def _divide_into_batches(self, settings: Measuring) -> None:
        """Make the passes over objectives' and risks' data, and those that are checked by."""
        sets, token_budget, risk = self.sets, self._token_budget, settings.risk_objective
        batches_of = partial(
            make_batches,
            token_budget=token_budget.tokens,
            reduction=settings.reduction,
            layout=self._layout,
        )

        def passes_over(
            sets: Mapping[str, SampleSet], allowed: TokenBudget | None = None
        ) -> list[DataPass]:
            offsets = {"forget": 0, "retain": len(sets["forget"])}
            return passes_for(
                self._parts,
                lambda name, roles: batches_of(sets[name], roles),
                offsets,
                allowed,
            )

        self._passes = passes_over(sets, token_budget)
        self._one_row = passes_over({name: rows.part([0]) for name, rows in sets.items()})
        of_risks = [sets[name] for name in self._sets_of_risks.values()]
        self._risk_passes = [
            DataPass(batches_of(rows, risk.roles), {m: risk}, token_budget=token_budget)
            for m, rows in enumerate(of_risks)
        ]
        first = make_batches(of_risks[0].part([0]), risk.roles, token_budget=1, layout=self._layout)
        self._first_risk_row = DataPass(first, {0: risk})
        self._risk_rows = None
        if "sample" in settings.resolve:
            sizes = dict(zip(self.risk_names, map(len, of_risks), strict=True))
            self._risk_rows = RiskRows(sizes, adds_up=settings.reduction == "sum")
        self._rounding = None
        if any(p.dtype in HALF for p in self.plan.model.parameters()):
            engine, resolution = self._choice.engine, self._resolution
            self._rounding = RoundingCheck.of(engine, resolution, self._mixture, passes_over)

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

    @ieee_fp32()
    def measure(
        self,
        *,
        out: str | Path | None = None,
        weights: bool = False,
        progress: bool = False,
        unchanged: bool = False,
        rounding: bool = True,
        step: StepMetric | None = None,
        second_order: bool = False,
        conflicts: bool = False,
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
            step: the step that is taken next, in whose metric effects are measured, or also are.
            second_order: also `step_curvature`, as `geffect_fast.profile` says it.
            conflicts: also `conflict_share`, as `geffect_fast.profile` says it.

        Raises:
            InputError: the result does not fit in memory, or `out` is of no use.
            NonFiniteError: a weight, gradient or effect is not finite; the first is named.
            UnsupportedModelError: the samples' shares miss a gradient.
        """
        resolution = self._resolution
        if second_order:
            check_second_order(self._attributes["risk"], self.plan)
        if not unchanged:
            check_finite(self.plan.model)
        beside = step is not None and step.beside
        shape = self._checked_shape(out, step)
        gradients = None
        if conflicts or second_order or (step is not None and not beside and step.reads != "none"):
            gradients = self.objective_gradients(unchanged=unchanged, progress=progress)
        taken = None
        if step is not None and not beside:
            taken = self._formed(step, gradients)
        rows = None
        if self._risk_rows is not None:
            rows = self._risk_rows.watch(None if taken is None else taken.diagonal)
        risk_values, directions = self.risk_gradients(progress=progress, watched=rows)
        conflict = {}
        if conflicts and gradients is not None:
            conflict = self._conflicts(directions, gradients, progress)
        if taken is not None:
            added = taken.beside_gradient(directions)
            taken.scale(directions)
        by_token = None
        if weights and resolution.within != "position":
            by_token = ObjectiveWeights(resolution, self._mixture)
        with (
            nullcontext(np.zeros(shape)) if out is None else EffectFile(out, resolution.dims, shape)
        ) as array:
            found = self._effects(array, directions, by_token, unchanged, progress, taken)
            gram = found.checked_gram(
                self.plan, self._mixture, self.risk_names, self._parts, self.objectives
            )
            attributes = self._measured_attributes(gram, unchanged)
            if taken is not None:
                attributes |= taken.metric.attributes(self.objectives)
            if self._rounding is not None and rounding:
                in_memory = isinstance(array, np.ndarray) and "sample" in resolution.axes
                attributes |= self._rounding.attributes(
                    self.plan, directions, self._reference, by_row(array) if in_memory else None
                )
            result = dataset(
                resolution,
                None if isinstance(array, EffectFile) else array,
                [str(o) for o in self.objectives],
                self.risk_names,
                risk_values,
                self._mixture @ found.values,
                gram if self._norms or self._choice.engine == "forward" else None,
                self._tokenizer,
                attributes,
            )
            if self._risk_rows is not None and rows is not None:
                of_risks = gram
                if of_risks is None:
                    of_risks = (gram_matrices if taken is None else taken.gram)(directions)
                square, names = float(of_risks[:, 0, 0].sum()), resolution.set_names
                intervals = self._risk_rows.variables(
                    by_row(array), names, rows, risk_values, square
                )
                result = result.assign(intervals).assign_attrs(interval_level=LEVEL)
            if taken is not None:
                effects = self._mixture @ found.summed.sum(-1)
                result = result.assign(taken.metric.variables(resolution, effects, added))
            elif step is not None:
                of_parts, mixture = found.gradients, self._mixture
                if of_parts is None:
                    mixture = torch.eye(len(self.objectives), dtype=mixture.dtype)
                    if gradients is None:
                        gradients = self.objective_gradients(unchanged=unchanged, progress=progress)
                    of_parts = gradients
                parameters, objectives = self.plan.parameters, self.objectives
                result = result.assign(
                    effects_beside(
                        step, parameters, directions, of_parts, mixture, objectives, resolution
                    )
                )
                result = result.assign_attrs(step.attributes(self.objectives))
            result = result.assign(conflict)
            if second_order and gradients is not None:
                if step is not None and taken is None:
                    taken = self._formed(step, gradients)
                result = result.assign(self._second_order(taken, gradients, progress))
            if by_token is not None:
                variables, coordinates = by_token.variables(self._tokenizer)
                result = result.assign(variables).assign_coords(coordinates)
            if isinstance(array, EffectFile):
                result = array.finish(result)
        return Measurement(result, directions)

    def _checked_shape(self, out: str | Path | None, step: StepMetric | None) -> tuple[int, ...]:
        """The shape of the effects; raise `InputError` where there is no place for them."""
        resolution, parameters = self._resolution, self.plan.parameters.values()
        if out is not None and not ("sample" in resolution.axes and resolution.within):
            raise InputError(
                "out: goes with resolve by 'sample' and 'position' or 'token'; leave it out"
            )
        shape = resolution.shape(len(self.objectives), len(self.risk_names))
        whole = len(self._parts) if self._norms or not resolution.per_sample else 0
        if step is not None and (step.beside or step.reads != "none"):
            whole = len(self._parts)
        check_memory(
            whole,
            sum(p.numel() for p in parameters),
            next(iter(parameters)).device,
            shape,
            out,
        )
        return shape

    def _effects(
        self,
        array: Any,
        directions: Mapping[str, Tensor],
        by_token: ObjectiveWeights | None,
        unchanged: bool,
        progress: bool,
        step: NextStep | None,
    ) -> Effects:
        """Run the engine: effects are added to `array`, weights of tokens told to `by_token`."""
        engine, passes = self._choice.engine, self._passes
        if by_token is not None:
            passes = [replace(data_pass, watch=by_token.add) for data_pass in passes]
        moves = []
        if engine == "forward":
            columns = self._resolution.columns()[1]
            moves = moves_for(self.plan, columns, len(self.risk_names))
        what, n_passes = "effects of the objectives", max(len(moves), 1)
        with self._ticking(progress, what, passes, n_passes) as tick:
            self._read_reference(passes, unchanged)
            return find_effects(
                engine,
                self.plan,
                passes,
                directions,
                self._reference,
                self._mixture,
                self._resolution,
                array,
                moves=moves,
                norms=self._norms,
                tick=tick,
                step=step,
            )

    def _formed(self, metric: StepMetric, gradients: Mapping[str, Tensor] | None) -> NextStep:
        """The step that is taken next, of the objectives' gradients `(K, *shape)` by parameter."""
        read = None
        if gradients is not None and metric.reads != "none":
            chosen = metric.formed_of(self.objectives)
            read = {name: of[chosen] for name, of in gradients.items()}
        return metric.formed(self.plan.parameters, read)

    def _conflicts(
        self, directions: Mapping[str, Tensor], gradients: Mapping[str, Tensor], progress: bool
    ) -> dict[str, Any]:
        """What `geffect_fast.profile` says of conflicts, of plain gradients."""
        retain = self.risk_names.index("retain")
        masses = gradient_masses(
            gradients, {name: of[retain] for name, of in directions.items()}, self._resolution
        )
        n = len(self.risk_names)
        with self._ticking(progress, "rows' gradients", self._risk_passes) as tick:
            traces = fisher_traces(self.plan, self._risk_passes, n, self._reference, tick)
        return conflict_variables(masses, traces, self._resolution)

    def _second_order(
        self, step: NextStep | None, gradients: Mapping[str, Tensor], progress: bool
    ) -> dict[str, Any]:
        """`step_curvature` (objective, risk), and the change it adds to where its size is known."""
        found = []
        for k in range(len(self.objectives)):
            own = {name: of[k] for name, of in gradients.items()}
            along = own if step is None else step.taken(own)
            if k == 0:
                check_twice_differentiable(self.plan, self._first_risk_row, along)
            with self._ticking(progress, "curvature of the risks", self._risk_passes) as tick:
                found.append(
                    curvature_along(self.plan, self._risk_passes, len(self.risk_names), along, tick)
                )
        slopes, curvatures = (torch.stack(each) for each in zip(*found, strict=True))
        rate = None if step is None else step.metric.learning_rate
        return second_order_variables(slopes, curvatures, rate)

    @ieee_fp32()
    def objective_gradients(
        self, *, unchanged: bool = False, progress: bool = False
    ) -> dict[str, Tensor]:
        """Whole gradients of the objectives, `(K, *shape)` by parameter.

        Args:
            unchanged, progress: as of `measure`.

        Raises:
            NonFiniteError: one is not finite.
        """
        with self._ticking(progress, "gradients of the objectives", self._passes) as tick:
            self._read_reference(self._passes, unchanged)
            _, gradients = accumulate_gradients(
                self.plan, self._passes, len(self._parts), self._reference, tick
            )
        mixed = mixed_gradients(self._mixture, gradients)
        check_gradients(mixed, [f"objective '{objective}'" for objective in self.objectives])
        return mixed

    def _read_reference(self, passes: Sequence[DataPass], unchanged: bool) -> None:
        """Have the reference ready for the passes, and find out whether it is the model itself."""
        device = self.plan.device
        if self._reference_is_model is None and unchanged:
            # Models that differ do so at the first row.
            same = self._reference.is_computed_by
            self._reference_is_model = all(
                same(self.plan.model, each, device) for each in (self._one_row, passes)
            )
        checked = self._rounding.passes if self._rounding is not None else []
        self._reference.prepare([*passes, *checked], device)

    @ieee_fp32()
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
        check_gradients(directions, [f"the risk on '{name}'" for name in self.risk_names])
        return values, directions

    @property
    def token_budget(self) -> int:
        """Tokens a batch; where memory ran out, less than it was."""
        return self._token_budget.tokens

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of results that hold for all measurements, as they are now."""
        return self._attributes | {"token_budget": self.token_budget}

    def _measured_attributes(self, gram: Tensor | None, unchanged: bool) -> dict[str, Any]:
        """And those of one measurement, of which `gram` was checked."""
        dtype = next(iter(self.plan.parameters.values())).dtype
        compared = gram is not None and self._choice.engine == "reverse"
        found = self.attributes | {
            "dtype": str(dtype).removeprefix("torch."),
            **self.plan.coverage().attributes(),
            "coverage_checked": int(compared),  # NetCDF has no booleans
        }
        if unchanged and self._reference_is_model:
            found["reference_is_model"] = 1
        return found

    def _possible(self, choice: Choice, asked: bool) -> Choice:
        """The engine chosen, or reverse where forward mode cannot pass the model.

        Raises:
            UnsupportedModelError: it cannot, and what is wanted needs it.
        """
        if choice.engine == "reverse":
            return choice
        problem = forward_mode_problem(self.plan, self.sets["forget"], self._layout)
        if problem is None:
            return choice
        if asked or self._resolution.within is not None:
            raise UnsupportedModelError(
                f"engine forward: {problem}; use engine='reverse', without 'token'"
            )
        return Choice("reverse", problem)

    def _tokens_that_fit(self) -> int:
        """Tokens a batch, from what they take and the memory that is free."""
        model, layout = self.plan.model, self._layout
        forward = self._choice.engine == "forward"
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
            within_budget(self._token_budget),
        ):
            yield lambda n: update(advance=n)

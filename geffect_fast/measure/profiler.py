"""Repeated measurements of a model with its present weights, by a `Schedule` that is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from geffect_fast.arguments import checked_config
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import check_finite, check_replicas, is_sharded
from geffect_fast.capture.shards import at_work
from geffect_fast.engines.batches import DataPass, Tick
from geffect_fast.engines.directions import accumulate_gradients, place_for_gradients
from geffect_fast.engines.forward import parameter_passes_for
from geffect_fast.engines.place_masses import check_places_apart
from geffect_fast.engines.reference import Reference
from geffect_fast.errors import InputError
from geffect_fast.measure.beside_effects import (
    TakenStep,
    check_second_order,
    conflicts_of,
    curvature_of,
    place_conflicts_of,
)
from geffect_fast.measure.effects import Effects, find_effects, mixed_gradients, whole_grams
from geffect_fast.measure.memory import (
    check_memory,
    check_place_memory,
    tell_of_copies,
    within_budget,
)
from geffect_fast.measure.precision import dtype_name
from geffect_fast.measure.prepare import Prepared, Schedule, prepare
from geffect_fast.measure.sources import Sources, resolved_list
from geffect_fast.measure.step_metric import NextStep, StepMetric
from geffect_fast.objectives import Objective
from geffect_fast.ops.ieee_fp32 import ieee_fp32
from geffect_fast.ranks import here
from geffect_fast.results.axes import by_row
from geffect_fast.results.dataset import check_gradients, dataset, gram_matrices
from geffect_fast.results.intervals import LEVEL
from geffect_fast.results.risk_rows import RowValues
from geffect_fast.results.token_weights import ObjectiveWeights
from geffect_fast.settings import Measuring
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.stream import EffectFile
from geffect_fast.terminal import progress_bar

if TYPE_CHECKING:
    import xarray as xr


R = TypeVar("R")

ROOM_FORWARD, ROOM_REVERSE = 0.5, 0.8
"""Parts of a GPU's free memory that whole gradients may take, by engine. The forward engine also
moves copies of them to the GPU; the reverse engine needs further room for batches only."""


def _on_all_ranks(method: Callable[..., R]) -> Callable[..., R]:
    """Decorate a method of a `Profiler` so that all ranks begin and end it together."""

    @wraps(method)
    def called(self: Profiler, *args: Any, **kwargs: Any) -> R:
        with (
            self.ranks.together(method.__name__),
            self.ranks.in_step(self.plan.shards is not None),
            nullcontext() if self.plan.shards is None else at_work(self.plan.model),
        ):
            return method(self, *args, **kwargs)

    return called


@dataclass(frozen=True)
class Measurement:
    """The result of one measurement of a model.

    Attributes:
        dataset: as `geffect_fast.profile` returns it.
        directions: the gradients of the risks by parameter, `(M, *shape)`, fp32 (fp64 for fp64
            models), in the order of `Profiler.risk_names`.
    """

    dataset: xr.Dataset
    directions: dict[str, Tensor]


class Profiler:
    """Measures a model repeatedly: its weights may change between measurements, the schedule stays.

    A reference model that is given is run at the first measurement, and its outputs then hold for
    all later ones. Without one, the reference is the model with its weights at each measurement.

    Within a process group of several ranks (`geffect_fast.ranks`) a profiler is made and called on
    all ranks, which share out the rows; each rank returns the whole result.

    Args:
        prepared: the model, its data and objectives, and what to measure.

    Attributes:
        plan: of the model, which must stay in eval mode while it is measured.
        ranks: the ranks that share the rows.
        sets: the data sets, tokenised: `forget`, `retain` and every probe by its name.
        objectives: the objectives.
        risk_names: names along the axis `risk`.
        own_loss: how the model's own loss differs from the risk; None: it does not.

    Examples:
        >>> profiler = Profiler.of(model, tokenizer, forget=rows, retain=others, objectives=["ga"])
        >>> before = profiler.measure().dataset
        >>> ...  # a training step
        >>> after = profiler.measure().dataset
    """

    @ieee_fp32()
    def __init__(self, prepared: Prepared[Measuring]) -> None:
        self.ranks = here()
        sharded = is_sharded(prepared.model)
        with self.ranks.together("Profiler"), self.ranks.in_step(sharded and self.ranks.size > 1):
            self.ranks.check_same(prepared.arguments_in_words())
            self.plan = Plan.of(prepared.model, may_be_sharded=True)
            self.ranks.check_serves(self.plan.device)
            if prepared.reference is not None:
                check_replicas(prepared.reference, self.ranks, "reference_model")
            with nullcontext() if self.plan.shards is None else at_work(self.plan.model):
                self._schedule = schedule = Schedule(prepared, self.plan)
        self.objectives, self.sets = prepared.objectives, prepared.sets
        self.risk_names, self.own_loss = schedule.risk_names, schedule.own_loss
        self._tokenizer = prepared.tokenizer
        self._reference = Reference(prepared.reference)
        self._reference_is_model: bool | None = False
        if prepared.compares:  # a given reference may compute the same, as a new adapter does
            self._reference_is_model = True if prepared.reference is None else None

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
        """Make a profiler of the arguments of `geffect_fast.profile`; errors are the same too."""
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

    @_on_all_ranks
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
            unchanged: whether the weights are still those of when the profiler was made, which were
                searched for NaN then and need not be again.
            rounding: for a 16-bit model, also how far effects can be trusted, as described at
                `geffect_fast.profile`.
            step: the step that is taken next; effects are measured in its metric, or in its metric
                too.
            second_order: also `step_curvature`, as described at `geffect_fast.profile`.
            conflicts: also `conflict_share`, and by position `place_conflict_share`, as described
                at `geffect_fast.profile`.

        Raises:
            InputError: the result does not fit in memory, `out` is of no use, or conflicts of an
                objective cannot be told apart by place.
            NonFiniteError: a weight, gradient or effect is not finite; the first is named.
            UnsupportedModelError: the samples' shares miss a gradient.
        """
        schedule, resolution = self._schedule, self._schedule.resolution
        given = {"out": out, "weights": weights, "second_order": second_order}
        given |= {"conflicts": conflicts, "metric": None if step is None else step.name}
        self.ranks.check_same({name: str(value) for name, value in given.items()})
        if second_order:
            check_second_order(schedule.attributes["risk"], self.plan)
        if not unchanged:
            check_finite(self.plan.model)
        check_replicas(self.plan.model, self.ranks)
        places = conflicts and resolution.within == "position"
        if self.plan.shards is not None:
            self.plan.shards.came.clear()
        shape = self._checked_shape(out, step)
        if places:
            check_places_apart(self.objectives, schedule.passes, schedule.mixture)
            check_place_memory(resolution.shape(len(self.objectives), 3))
        # Found at the first call, and only once.
        gradients = cache(partial(self.objective_gradients, unchanged=unchanged, progress=progress))
        taken = None if step is None else TakenStep(schedule, step, gradients)
        along = None if taken is None else taken.in_place
        rows = schedule.watched_rows(None if along is None else along.diagonal)
        risk_values, directions = self.risk_gradients(progress=progress, watched=rows)
        variables: dict[str, Any] = {}
        if conflicts:
            own = gradients()  # before the next bar, since this one draws its own
            with self._ticking(progress, "rows' gradients", schedule.risk_passes) as tick:
                variables |= conflicts_of(schedule, directions, own, self._reference, tick)
        if places:
            with self._ticking(progress, "conflicts by place", schedule.passes) as tick:
                variables |= place_conflicts_of(schedule, directions, self._reference, tick)
        if taken is not None:
            taken.scale(directions)
        by_token = None
        if weights and resolution.within != "position":
            by_token = ObjectiveWeights(resolution, schedule.mixture)
        file = None
        if out is not None and self.ranks.first:  # other ranks read the file that it writes
            file = EffectFile(out, resolution.dims, shape)
        with (
            nullcontext(np.zeros(shape) if out is None else None) if file is None else file as array
        ):
            found = self._effects(array, directions, by_token, unchanged, progress, along)
            gram = found.checked_gram(
                self.plan, schedule.mixture, self.risk_names, schedule.parts, self.objectives
            )
            attributes = self._measured_attributes(gram, unchanged)
            if rounding and schedule.rounding is not None:
                in_memory = out is None and "sample" in resolution.axes
                error = schedule.rounding.attributes(
                    self.plan, directions, self._reference, by_row(array) if in_memory else None
                )
                attributes |= self.ranks.first_of(error)
            if rows is not None:
                form = gram_matrices if along is None else along.gram
                of_risks = gram
                if of_risks is None:
                    of_risks = whole_grams(self.plan, form, directions)
                square, names = float(of_risks[:, 0, 0].sum()), resolution.set_names
                each = self.ranks.first_of(None if array is None else by_row(array))
                assert each is not None  # it came from the first rank
                variables |= rows.variables(each, names, risk_values, square)
                attributes["interval_level"] = LEVEL
            if taken is not None:
                variables |= taken.variables(directions, found)
                attributes |= taken.metric.attributes(self.objectives)
            if second_order:
                own, what, n_passes = gradients(), "curvature of the risks", len(self.objectives)
                with self._ticking(progress, what, schedule.risk_passes, n_passes) as tick:
                    variables |= curvature_of(schedule, taken, own, tick)
            result = dataset(
                resolution,
                array if isinstance(array, np.ndarray) else None,
                [str(o) for o in self.objectives],
                self.risk_names,
                risk_values,
                schedule.mixture @ found.values,
                gram if schedule.norms or schedule.choice.engine == "forward" else None,
                self._tokenizer,
                attributes,
            )
            result = result.assign(variables)
            if by_token is not None:
                of_tokens, coordinates = by_token.variables(self._tokenizer, self.ranks)
                result = result.assign(of_tokens).assign_coords(coordinates)
            if out is not None:
                if file is not None:
                    result = file.finish(result)
                self.ranks.meet()
                if file is None:
                    result = open_run(out, lazy=True)
                self.ranks.meet()  # the file may be moved from now on
        return Measurement(result, directions)

    def _checked_shape(self, out: str | Path | None, step: StepMetric | None) -> tuple[int, ...]:
        """The shape of the effects.

        Raises:
            InputError: whole gradients or the result do not fit in memory, or `out` is of no use.
        """
        schedule, resolution = self._schedule, self._schedule.resolution
        if out is not None and not ("sample" in resolution.axes and resolution.within):
            raise InputError(
                "out: goes with resolve by 'sample' and 'position' or 'token'; leave it out"
            )
        shape = resolution.shape(len(self.objectives), len(self.risk_names))
        whole = schedule.norms or not resolution.per_sample
        if step is not None and (step.beside or step.reads != "none"):
            whole = True
        check_memory(
            len(schedule.parts) if whole else 0,
            sum(p.numel() for p in self.plan.held.values()),
            self._kept_on() or self.plan.device,
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
        """Run the engine: add effects to `array`, and weights of tokens to `by_token` if given."""
        schedule, passes = self._schedule, self._schedule.passes
        if by_token is not None:
            passes = [replace(data_pass, watch=by_token.add) for data_pass in passes]
        parameter_passes = []
        if schedule.choice.engine == "forward":
            columns = schedule.resolution.columns()[1]
            parameter_passes = parameter_passes_for(self.plan, columns, len(self.risk_names))
        what, n_passes = "effects of the objectives", max(len(parameter_passes), 1)
        with self._ticking(progress, what, passes, n_passes) as tick:
            self._read_reference(passes, unchanged)
            return find_effects(
                schedule.choice.engine,
                self.plan,
                passes,
                directions,
                self._reference,
                schedule.mixture,
                schedule.resolution,
                array,
                parameter_passes=parameter_passes,
                norms=schedule.norms,
                tick=tick,
                step=step,
            )

    @property
    def _n_gradients(self) -> int:
        """Number of whole gradients that are kept: the risks', and the parts' where formed."""
        schedule = self._schedule
        reverse = schedule.choice.engine == "reverse"
        whole = reverse and (schedule.norms or not schedule.resolution.per_sample)
        return len(self.risk_names) + (len(schedule.parts) if whole else 0)

    def _kept_on(self) -> torch.device | None:
        """The device that keeps whole gradients; None: the parameters' own.

        All ranks keep gradients on the CPU if one rank has no room, since the ranks add them up.
        """
        fraction = ROOM_FORWARD if self._schedule.choice.engine == "forward" else ROOM_REVERSE
        found = self.ranks.meet(place_for_gradients(self.plan, self._n_gradients, fraction))
        return next((place for place in found if place is not None), None)

    def _measured_attributes(self, gram: Tensor | None, unchanged: bool) -> dict[str, Any]:
        """Attributes of one measurement.

        Args:
            gram: the checked Gram matrices; None: none are formed.
            unchanged: as `measure` takes it.
        """
        dtype = next(iter(self.plan.parameters.values())).dtype
        compared = gram is not None and self._schedule.choice.engine == "reverse"
        found = self.attributes | {
            "dtype": dtype_name(dtype),
            **self.plan.coverage().attributes(),
            "coverage_checked": int(compared),  # NetCDF has no booleans
            "token_budget": min(self.ranks.meet(self.token_budget)),
        }
        if self.plan.shards is not None:
            found["exchanged"] = self.plan.shards.said_of_products()
        if unchanged and self._reference_is_model:
            found["reference_is_model"] = 1
        return found

    @_on_all_ranks
    @ieee_fp32()
    def objective_gradients(
        self, *, unchanged: bool = False, progress: bool = False
    ) -> dict[str, Tensor]:
        """Whole gradients of the objectives, `(K, *shape)` by parameter.

        Args:
            unchanged, progress: as `measure` takes them.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        schedule = self._schedule
        with self._ticking(progress, "gradients of the objectives", schedule.passes) as tick:
            self._read_reference(schedule.passes, unchanged)
            _, gradients = accumulate_gradients(
                self.plan,
                schedule.passes,
                len(schedule.parts),
                self._reference,
                tick,
                self._kept_on(),
            )
        mixed = mixed_gradients(schedule.mixture, gradients)
        check_gradients(mixed, [f"objective '{objective}'" for objective in self.objectives])
        return mixed

    def _read_reference(self, passes: Sequence[DataPass], unchanged: bool) -> None:
        """Prepare the reference for the passes, and find out whether it is the model itself."""
        schedule, device = self._schedule, self.plan.device
        if self._reference_is_model is None and unchanged:
            # Models that differ already differ at the first row.
            same = self._reference.is_computed_by
            found = all(same(self.plan.model, each, device) for each in (schedule.one_row, passes))
            self._reference_is_model = all(self.ranks.meet(found))
        checked = schedule.rounding.passes if schedule.rounding is not None else []
        self._reference.prepare([*passes, *checked], device)

    @_on_all_ranks
    @ieee_fp32()
    def risk_gradients(
        self, *, progress: bool = False, watched: RowValues | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Values of the risks, `(M,)` fp64, and their gradients, as `Measurement.directions`.

        Args:
            progress: show a bar.
            watched: collects what every row adds to the risks.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        schedule, n = self._schedule, len(self.risk_names)
        kept_on = self._kept_on()
        if kept_on is not None:
            n_elements = sum(p.numel() for p in self.plan.held.values())
            tell_of_copies(self._n_gradients, n, n_elements, self.plan.device)
        passes = schedule.risk_passes
        if watched is not None:
            passes = [replace(data_pass, watch=watched.add) for data_pass in passes]
        with self._ticking(progress, "gradients of the risks", passes) as tick:
            values, directions = accumulate_gradients(
                self.plan,
                passes,
                n,
                self._reference,
                tick,
                kept_on,
                None if watched is None else watched.products,
            )
        if watched is not None:
            watched.gather(self.ranks)
        check_gradients(directions, [f"the risk on '{name}'" for name in self.risk_names])
        return values, directions

    @property
    def token_budget(self) -> int:
        """Tokens a batch; fewer than at first where memory ran out."""
        return self._schedule.token_budget.tokens

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of results that hold for all measurements, with the present token budget."""
        return self._schedule.attributes | {"token_budget": self.token_budget}

    @contextmanager
    def _ticking(
        self, show: bool, what: str, passes: Sequence[DataPass], n_passes: int = 1
    ) -> Iterator[Tick]:
        """Yield a function that is told of tokens done and draws a bar, inside `within_budget`."""
        n_tokens = n_passes * sum(data_pass.n_tokens for data_pass in passes)
        with (
            progress_bar(show and self.ranks.first, what, n_tokens) as update,
            within_budget(self._schedule.token_budget),
        ):
            yield lambda n: update(advance=n)

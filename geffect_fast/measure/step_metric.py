"""Effects of the step that is really taken: `e_P = < grad R, P grad L >`, and the terms beside it.

`P` is the diagonal by which the optimizer scales a gradient (`geffect_fast.optimizers.rules`).
Effects are measured along `P grad R` in place of `grad R`, so engines do not know of `P`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import own_part
from geffect_fast.capture.parts import part_of
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective
from geffect_fast.ops.reference import accumulation_dtype
from geffect_fast.optimizers.rules import RULES, Held, OptimizerRule
from geffect_fast.optimizers.state import (
    KNOWN,
    check_options,
    held_by,
    held_in_state,
    inside,
    kind_of,
    kind_of_state,
    read_state,
)
from geffect_fast.results.axes import Resolution
from geffect_fast.results.dataset import gram_matrices

if TYPE_CHECKING:
    import xarray as xr

GIVEN = "diagonal"
"""The metric's name where the user gives its diagonal."""

PIECE = {"cpu": 2**16, "cuda": 2**22}
"""Entries of a parameter that are read at a time, by kind of device: few enough for the cache of a
CPU core, and enough to keep a GPU busy."""


@dataclass(frozen=True)
class StepMetric:
    """The metric of a model's next step.

    Attributes:
        name: sgd, adam, adamw, lion or diagonal.
        held: the optimizer's group and state for each parameter; empty with a given diagonal.
        rule: how the optimizer steps; None: with a given diagonal.
        given: the given diagonal, by parameter; None: there is none.
        learning_rate: of the step, the largest of the groups; None: not known.
        state: in words, what `P` is made from.
        step_of: the objective whose step is taken; None: all that are measured.
        beside: whether effects in this metric stand beside those along the gradient, instead of
            replacing them.
    """

    name: str
    held: Mapping[str, Held]
    rule: OptimizerRule | None = None
    given: Mapping[str, Tensor] | None = None
    learning_rate: float | None = None
    state: str = ""
    step_of: Objective | None = None
    beside: bool = False

    @staticmethod
    def of(
        metric: str | Mapping[str, Tensor],
        optimizer: Any,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
    ) -> StepMetric:
        """Make the metric of the arguments of `geffect_fast.profile`.

        Args:
            metric: a key of `RULES`, or a diagonal by parameter.
            optimizer: a live one, a file or folder that `read_state` reads, or None.
            model: the model that is profiled.
            parameters: the model's trainable parameters at rest, by name.

        Raises:
            InputError: the metric is not known, or the optimizer is of another kind or model.
        """
        if isinstance(metric, Mapping):
            if optimizer is not None:
                raise InputError("optimizer: a diagonal is given as metric; leave one of them out")
            return StepMetric(GIVEN, {}, given=_checked_diagonal(metric, parameters), state="given")
        check_metric(metric)
        if optimizer is None:
            group = {"lr": 1.0, **RULES[metric].options}
            group["decoupled_weight_decay"] = metric == "adamw"
            held = {name: Held(own_part(p), group, {}) for name, p in parameters.items()}
            return replace(_stepping(metric, held, "optimizer"), learning_rate=None)
        if isinstance(optimizer, str | Path):
            state, where = read_state(optimizer)
            _check_kind(kind_of_state(state), metric, f"optimizer {where}", "its state")
            held = held_in_state(state, where, model, parameters)
            return _stepping(metric, held, f"optimizer {where}")
        _check_kind(kind_of(optimizer), metric, "optimizer", type(inside(optimizer)).__name__)
        return _stepping(metric, held_by(optimizer, parameters), "optimizer")

    @staticmethod
    def live(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> StepMetric:
        """Make the metric of a training's live optimizer, for effects beside those of the gradient.

        Raises:
            InputError: the optimizer is not known, or does not hold a parameter.
        """
        kind = kind_of(optimizer)
        if kind is None:
            name = type(inside(optimizer)).__name__
            raise InputError(f"optimizer: {name} is not known; effects in its metric need {KNOWN}")
        held = held_by(optimizer, parameters)
        return replace(_stepping(kind, held, "optimizer"), beside=True)

    @staticmethod
    def saved(source: Path, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> StepMetric:
        """Make the metric of a checkpoint's optimizer, for effects beside those of the gradient.

        Raises:
            InputError: as `live`, or the file is damaged.
        """
        state, where = read_state(source)
        kind = kind_of_state(state)
        if kind is None:
            raise InputError(f"optimizer {where}: its state is of no kind that is known: {KNOWN}")
        held = held_in_state(state, where, model, parameters)
        return replace(_stepping(kind, held, f"optimizer {where}"), beside=True)

    @property
    def reads(self) -> str:
        """The kind of gradients that `P` is formed with, as `OptimizerRule.reads`."""
        return "none" if self.rule is None else self.rule.reads

    def formed_of(self, objectives: Sequence[Objective]) -> list[int]:
        """Numbers of the objectives with whose gradients `P` is formed."""
        return [k for k, each in enumerate(objectives) if self.step_of in (None, each)]

    def products(
        self,
        parameters: Mapping[str, Tensor],
        directions: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        mixture: Tensor,
        chosen: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Effects of the step by parameter, and the effects that momentum and weight decay add.

        Parameters are read piece by piece, so that nothing of the model's size is held. Where ranks
        share out the model, all tensors by parameter are this rank's parts, and the caller adds up
        the products over ranks.

        Args:
            parameters: the trainable parameters, by name.
            directions: gradients of the risks, `(M, *shape)` by parameter.
            gradients: `(n, *shape)` by parameter.
            mixture: `(K, n)`, how often each of `gradients` counts in each objective's gradient.
            chosen: numbers of the objectives with whose gradients `P` is formed.

        Returns:
            `< V_m, P grad L_k >`, `(K, M, P)`, and the terms of momentum and of weight decay,
            `(P, M)` each; fp64 on the CPU.
        """
        sums = []
        for name, p in parameters.items():
            v, g = (of[name].flatten(1) for of in (directions, gradients))
            mixed_by = mixture.to(p.device, g.dtype)
            total = torch.zeros(len(mixture) + 2, len(v), dtype=torch.float64, device=p.device)
            for at in _pieces(p):
                along = v[:, at].to(p.device).T
                own = mixed_by @ g[:, at].to(p.device)
                if self.rule is None:
                    assert self.given is not None
                    given = self.given[name]
                    diagonal = given.flatten()[at] if given.shape == p.shape else given
                else:
                    held = self.held[name].piece(at)
                    diagonal = self.rule.diagonal(held, own[chosen])
                    for row, term in (
                        (-2, self.rule.momentum(held, diagonal)),
                        (-1, self.rule.decay(held, diagonal)),
                    ):
                        if term is not None:
                            total[row] += term @ along
                total[:-2] += own.mul_(diagonal) @ along
            sums.append(total)
        found = torch.stack([total.to(sums[0].device) for total in sums]).cpu()
        return found[:, :-2].permute(1, 2, 0), found[:, -2], found[:, -1]

    def formed(
        self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None
    ) -> NextStep:
        """The step, with `P` formed for every parameter.

        Args:
            parameters: the trainable parameters, by name.
            gradients: the gradients `(K, *shape)` that `P` is formed with, by parameter; None where
                `reads` is "none".
        """
        if self.rule is None:
            assert self.given is not None
            return NextStep(self, {name: self.given[name] for name in parameters})
        diagonal = {
            name: self.rule.diagonal(
                self.held[name], None if gradients is None else gradients[name]
            )
            for name in parameters
        }
        return NextStep(self, diagonal)

    def attributes(self, objectives: Sequence[Objective]) -> dict[str, Any]:
        """Attributes of a result about the metric."""
        prefix = "step_metric" if self.beside else "metric"
        found = {prefix: self.name, f"{prefix}_state": self.state}
        if self.reads != "none":
            of = [self.step_of] if self.step_of is not None else objectives
            found[f"{prefix}_of"] = ", ".join(map(str, of))
        return found

    def variables(
        self,
        resolution: Resolution,
        effects: Tensor,
        beside: Sequence[Tensor],
    ) -> dict[str, Any]:
        """Variables of a result about the step, beside effects by parameter, sample and token.

        Args:
            resolution: the axes.
            effects: effects in this metric, summed over all axes, `(K, M)`.
            beside: the effects that momentum and weight decay add, `(P, M)` each.

        Returns:
            `momentum_effect` and `decay_effect` (risk, and parameter or group where that is an
            axis), `step_total` (objective, risk), and where the learning rate is known
            `step_learning_rate` and `predicted_change` (objective, risk).
        """
        labels, columns = resolution.columns()
        by = resolution.by_parameter_or_group
        variables: dict[str, Any] = {}
        for name, of in zip(("momentum_effect", "decay_effect"), beside, strict=True):
            placed = of.new_zeros(len(labels), of.shape[1]).index_add_(0, torch.tensor(columns), of)
            dims = ("risk",) if by is None else ("risk", by)
            variables[name] = (dims, (placed.sum(0) if by is None else placed.T).numpy())
        total = effects + sum(of.sum(0) for of in beside)
        variables["step_total"] = (("objective", "risk"), total.numpy())
        rate = self.learning_rate
        if rate is not None:
            variables["step_learning_rate"] = ((), rate)
            variables["predicted_change"] = (("objective", "risk"), (-rate * total).numpy())
        return variables


@dataclass(frozen=True)
class NextStep:
    """A step that is about to be taken.

    Attributes:
        metric: of the step.
        diagonal: `P` by parameter, of the parameter's shape or a scalar, in the dtype that
            gradients are added up in.
    """

    metric: StepMetric
    diagonal: dict[str, Tensor]

    def scale(self, gradients: Mapping[str, Tensor]) -> None:
        """Multiply gradients `(n, *shape)` by parameter with `P`, in place."""
        for name, of in gradients.items():
            of.mul_(self.diagonal[name].to(of.device))

    def gram(self, scaled: Mapping[str, Tensor], *plain: Mapping[str, Tensor]) -> Tensor:
        """Gram matrices `(P, n, n)` fp64 in the metric, as `gram_matrices` forms them without one.

        Args:
            scaled: gradients already multiplied with `P`, by parameter.
            plain: further gradients, not multiplied with `P`.
        """
        found = []
        for name, of in scaled.items():
            root = self.diagonal[name].sqrt().to(of.device)
            halves = [torch.where(root > 0, of / root, 0.0), *(each[name] * root for each in plain)]
            found.append(gram_matrices({name: torch.cat(halves)}))
        return torch.cat(found)

    def beside_gradient(self, directions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The effects that momentum and weight decay add, `(P, M)` fp64 each, on the CPU.

        Args:
            directions: gradients of the risks, `(M, *shape)` by parameter.
        """
        n = len(next(iter(directions.values())))
        added = torch.zeros(2, len(directions), n, dtype=torch.float64)
        for at, (name, v) in enumerate(directions.items() if self.metric.rule else ()):
            for which, term in enumerate(self._terms(name)):
                if term is not None:
                    added[which, at] = _inner(v, term)
        return added[0], added[1]

    def _terms(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """The step's momentum and weight decay at one parameter, of its shape; None: none."""
        rule, held, diagonal = self.metric.rule, self.metric.held[name], self.diagonal[name]
        assert rule is not None
        return rule.momentum(held, diagonal), rule.decay(held, diagonal)

    def taken(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole step for a gradient by parameter, `P g + momentum + decay`, fp32 or fp64."""
        found = {}
        for name, g in gradient.items():
            step = self.diagonal[name].to(g.device) * g
            for term in self._terms(name) if self.metric.rule is not None else ():
                if term is not None:
                    step += term.to(g.device)
            found[name] = step
        return found


def without_step(dataset: xr.Dataset, second_order: bool) -> xr.Dataset:
    """A result of plain effects, with NaN for the variables of the step that would stand beside."""
    effect = dataset["g_effect"]
    of_risk = [d for d in ("risk", "parameter", "group") if d in effect.dims]
    unknown = effect.sum([d for d in effect.dims if d not in ("objective", *of_risk)]) * math.nan
    whole = unknown.sum([d for d in of_risk if d != "risk"], skipna=False)
    curved = ("step_curvature", "predicted_change_second") if second_order else ()
    return dataset.assign(
        {
            "step_effect": unknown,
            **{f"{n}_effect": unknown.isel(objective=0, drop=True) for n in ("momentum", "decay")},
            "step_total": whole,
            "predicted_change": whole,
            **dict.fromkeys(curved, whole),
            "step_learning_rate": math.nan,
        }
    )


def check_metric(metric: Any) -> None:
    """Raise `InputError` where a metric's name is not known."""
    if metric not in RULES:
        raise InputError(
            f"metric: unknown {metric!r}; choose from {KNOWN}, or give a diagonal by parameter"
        )


def step_objective(
    metric: StepMetric, step_of: Objective | None, objectives: Sequence[Objective]
) -> StepMetric:
    """The metric with the objective whose step is taken; a single objective need not be named.

    Raises:
        InputError: `step_of` is not among the objectives, or has to be given.
    """
    if step_of is not None and step_of not in objectives:
        listed = ", ".join(map(str, objectives))
        raise InputError(f"step_of: '{step_of}' is not among the objectives: {listed}; add it")
    if step_of is None and len(objectives) == 1:
        step_of = objectives[0]
    if step_of is None and metric.reads == "one":
        raise InputError(
            f"metric {metric.name}: it takes the sign of one gradient, and there are "
            f"{len(objectives)} objectives; name the one that is trained on by step_of (--step-of)"
        )
    return replace(metric, step_of=step_of)


def _pieces(parameter: Tensor) -> Iterator[slice]:
    """Slices that cut the entries of a parameter into pieces."""
    size = PIECE.get(parameter.device.type, PIECE["cuda"])
    return (slice(start, start + size) for start in range(0, parameter.numel(), size))


def _stepping(kind: str, held: Mapping[str, Held], where: str) -> StepMetric:
    """The metric of an optimizer of a known kind."""
    check_options(held.values(), kind, where)
    rule = RULES[kind]
    rates = {name: float(each.group["lr"]) for name, each in held.items()}
    rate = max(rates.values())
    if rate > 0:
        held = {name: replace(each, rate=rates[name] / rate) for name, each in held.items()}
    fresh = [name for name, each in held.items() if rule.fresh(each)]
    state = "of the optimizer"
    if fresh:
        of = "all" if len(fresh) == len(held) else f"{len(fresh)} of {len(held)}"
        state = f"none for {of} parameters: estimated from squared gradients, as in a first step"
    return StepMetric(kind, held, rule, learning_rate=rate, state=state)


def _check_kind(found: str | None, metric: str, where: str, name: str) -> None:
    """Raise `InputError` where an optimizer is not of the metric's kind."""
    if found is None:
        raise InputError(f"{where}: {name} is of no kind that is known; use one of {KNOWN}")
    if found != metric:
        raise InputError(f"{where}: {name} is {found}, and metric is {metric}; give metric={found}")


def _checked_diagonal(
    given: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The given diagonal, checked, for every parameter.

    Raises:
        InputError: naming a parameter whose diagonal is missing, unknown, of another shape,
            negative or not finite.
    """
    for name in given:
        if name not in parameters:
            raise InputError(f"metric: the model has no trainable parameter {name!r}; leave it out")
    diagonal = {}
    for name, p in parameters.items():
        of = given.get(name)
        if not isinstance(of, Tensor) or of.shape not in (p.shape, ()):
            has = f"a tensor of shape {tuple(of.shape)}" if isinstance(of, Tensor) else "no tensor"
            raise InputError(
                f"metric: the diagonal given has {has} for '{name}'; give one of shape "
                f"{tuple(p.shape)}"
            )
        of = of.detach().to(p.device, accumulation_dtype(p.dtype))
        of = own_part(part_of(of, p)) if of.dim() else of
        if not bool((torch.isfinite(of) & (of >= 0)).all()):
            raise InputError(
                f"metric: the diagonal of '{name}' has a value that is negative or not finite"
            )
        diagonal[name] = of
    return diagonal


def _inner(v: Tensor, x: Tensor) -> Tensor:
    """`< V_m, x >` for each of `(M, *shape)`, `(M,)` fp64 on the CPU."""
    return (v.flatten(1) @ x.to(v.device, v.dtype).flatten()).double().cpu()

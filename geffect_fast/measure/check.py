"""`check`: the engine against plain autograd, one sample at a time, on a user's own model and data.

Exactness depends on the model as much as on the engine, since a module may do what no rule foresaw.
So the effects, norms and inner products of every parameter are computed both ways and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.arguments import checked_config, with_settings
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import check_is_model, is_sharded
from geffect_fast.capture.plan import Coverage
from geffect_fast.capture.shards import at_work
from geffect_fast.data import read_refusals, read_rows
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.engines.known_models import choose_layout, own_loss
from geffect_fast.engines.layout import check_reference, longest_sequence
from geffect_fast.engines.own_loss import OwnLoss
from geffect_fast.errors import InputError, NonFiniteError
from geffect_fast.measure.by_capture import CapturedNumbers
from geffect_fast.measure.memory import within_budget
from geffect_fast.measure.plain_autograd import Numbers, plain_numbers, plain_tokens
from geffect_fast.measure.precision import (
    TOLERANCE,
    WIDER,
    coarsest_dtype,
    computing_in,
    dtype_name,
    widened_copy,
)
from geffect_fast.measure.prepare import prepare
from geffect_fast.measure.sources import Sources, check_count, resolved_list
from geffect_fast.objectives import Objective
from geffect_fast.ops.ieee_fp32 import ieee_fp32
from geffect_fast.ranks import here
from geffect_fast.results.groups import kind_of
from geffect_fast.settings import Reading
from geffect_fast.terminal import progress_bar

QUANTITIES = ("effects", "norms", "products")
SMALL = 1e-3
"""Smallest scale that errors are relative to, as a part of the model's largest norm (squared for
effects and products). A smaller gradient is a difference of larger numbers, and every method that
rounds on the way is imprecise there."""
ALLOWANCE = 2.0
"""Multiple of plain autograd's own rounding error up to which an error is still rounding."""
NOISE = 0.5
"""Rounding errors reach this part of an objective's largest effect only where the objective is at
its minimum: its effects are then nothing but rounding."""


@dataclass(frozen=True)
class KindCheck:
    """The comparison for all parameters of one kind, such as `q_proj` or `q_proj.bias`.

    Mappings are by quantity: `effects`, `norms` and `products`.

    Attributes:
        kind: the coordinate `kind` of a profile.
        rules: the rules of capture that served the kind; empty where no rule did.
        n_parameters: number of parameters of the kind.
        relative: largest error, relative to the parameter's largest share, or to a thousandth
            (a millionth for effects and products) of the model's largest where that is more.
        absolute: largest error.
        judged: the error that is compared with `limit`: `relative`, or, against a wider precision,
            the root mean square of all relative errors, as the largest is a matter of chance then.
        limit: largest error that is still rounding.
        worst: name of the parameter with the largest error.
    """

    kind: str
    rules: tuple[str, ...]
    n_parameters: int
    relative: Mapping[str, float]
    absolute: Mapping[str, float]
    judged: Mapping[str, float]
    limit: Mapping[str, float]
    worst: str

    @property
    def excess(self) -> float:
        """Largest error as a multiple of its limit; more than 1 is a deviation."""
        return max(self.judged[q] / self.limit[q] for q in QUANTITIES)


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        kinds: the comparison, kind by kind, in the model's order.
        coverage: the parameters that the numbers are of.
        uncovered: trainable parameters that have a gradient and that no rule captured.
        unreached: trainable parameters without any gradient on these samples, such as an expert
            that no token was sent to. Both ways give zero for them, so they are hardly checked.
        dtype: the model's precision.
        wider: the precision that errors were measured against; None: the model's own, which was
            enough to tell errors from rounding.
        tolerance: relative error that is always rounding.
        layout: how samples share a forward pass.
        objectives: the objectives that were checked.
        n_samples, n_tokens: the samples that served the check, and the tokens of their answers.
        own_loss: how the model's own loss differs from the risk; None: it does not.
        rounding_measured: whether limits include the rounding errors of plain autograd in the
            model's precision; these are not measured where every error is within the tolerance.
    """

    kinds: tuple[KindCheck, ...]
    coverage: Coverage
    uncovered: tuple[str, ...]
    unreached: tuple[str, ...]
    dtype: str
    wider: str | None
    tolerance: float
    layout: str
    objectives: tuple[str, ...]
    n_samples: int
    n_tokens: int
    own_loss: OwnLoss | None = None
    rounding_measured: bool = False

    @property
    def exact(self) -> bool:
        """Whether every trainable parameter is covered and every error is rounding."""
        return not self.uncovered and all(kind.excess <= 1 for kind in self.kinds)


@with_settings(Reading)
@ieee_fp32()
def check(
    model: nn.Module,
    tokenizer: Any,
    *,
    data: Any,
    objectives: Sequence[str | Objective] | str = ("ga",),
    samples: int = 4,
    refusals: Any = None,
    reference_model: nn.Module | str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Check:
    """Compare the engine with plain autograd on a few samples, parameter by parameter.

    Three quantities are compared: every sample's effect along the risk's gradient for each
    objective, the norm of every sample's gradient, and the inner products of the gradients of all
    pairs of samples. Plain autograd runs every sequence by itself, differentiates the published
    formula and sums in fp64. For `n` samples and `K` objectives it takes `n + K n` backward passes
    of one sample (8 for 4 samples and one objective). Where `n` gradients would take more than a
    quarter of free memory, it takes `n (n + 1) / 2 + n + K n`, and holds two gradients at a time.

    An error is rounding where it is at most a tolerance: 1e-10 in fp64, 1e-5 in fp32, and, in the
    root mean square against plain autograd in fp32 on the same weights, 2^-8 in bf16 and 2^-11 in
    fp16. A larger error in fp32 or 16 bits is still rounding if it is at most the tolerance plus
    twice plain autograd's own error, both against the wider precision (fp64, or fp32).

    Where ranks share out the model (FSDP2), all of them check it together. Of a whole model each
    rank that calls this function does the whole check.

    Args:
        model, tokenizer: as for `profile`.
        data: forget data as for `profile`; the same rows serve as retain data.
        objectives: as for `profile`.
        samples: number of rows of the data, or windows of plain text, that are read from the start.
        refusals, reference_model, progress: as for `profile`.
        settings:

    Returns:
        A `Check`, whose `exact` is the verdict.

    Raises:
        InputError, NonFiniteError, UnsupportedModelError: as `profile` raises them.

    Examples:
        >>> gf.check(model, tokenizer, data="forget.jsonl").exact
        True
    """
    check_is_model(model)
    ranks, sharded = here(), is_sharded(model)
    with (
        ranks.together("check") if sharded else nullcontext(),
        ranks.in_step(sharded and ranks.size > 1),
        at_work(model),
    ):
        return _checked(
            model,
            tokenizer,
            data,
            objectives,
            samples,
            refusals,
            reference_model,
            progress and (ranks.first or not sharded),
            settings,
        )


def _checked(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    objectives: Sequence[str | Objective] | str,
    samples: int,
    refusals: Any,
    reference_model: nn.Module | str | Path | None,
    progress: bool,
    settings: dict[str, Any],
) -> Check:
    """Do the work of `check`; where ranks share out the model, all of them come here together."""
    check_count("samples", samples)
    chosen = resolved_list(objectives)
    reading = checked_config(Reading, settings)
    rows = read_rows(data, name="data", data_format=reading.data_format)[:samples]
    some = None if refusals is None else read_refusals(refusals)[:samples]
    prepared = prepare(
        model, tokenizer, Sources({"data": rows}, some), chosen, reading, reference_model
    )
    # Plain text becomes several samples, one for each window: keep the first ones.
    prepared = prepared.of_rows({"data": range(min(samples, len(prepared.sets["data"])))})
    sample_set, reference = prepared.sets["data"], prepared.reference
    token_budget = reading.token_budget
    plan = Plan.of(model, may_be_sharded=True)
    if plan.shards is not None:
        plan.shards.ranks.check_same(prepared.arguments_in_words())
    dtype = coarsest_dtype(model)

    def plain_in(precision: torch.dtype) -> Numbers:
        other = model if precision == dtype else widened_copy(model, precision)
        what = f"plain autograd, {dtype_name(precision)}"
        n_tokens = plain_tokens(other, sample_set, chosen)
        with (
            computing_in(precision, other),
            progress_bar(progress, what, n_tokens) as update,
            within_budget(captured.token_budget, one_sample=True),
        ):
            return plain_numbers(other, sample_set, chosen, reference, lambda n: update(advance=n))

    longest = longest_sequence(sample_set)
    with computing_in(dtype, model):
        with within_budget(TokenBudget(token_budget or longest), one_sample=True):
            layout = choose_layout(plan, sample_set)
            own = own_loss(plan, sample_set)
            if reference is not None:
                check_reference(reference, layout, sample_set, longest)
        captured = CapturedNumbers(plan, sample_set, chosen, reference, layout, token_budget)
        with (
            progress_bar(progress, "geffect_fast", captured.n_tokens) as update,
            within_budget(captured.token_budget),
        ):
            ours = captured.compute(lambda n: update(advance=n))
        rules = captured.rules()
    found = _compared(ours, plain_in, dtype, plan)
    _check_objectives(chosen, found, dtype)
    plain = found.plain
    silent = (plain.norms == 0).all(1) & (plain.effects == 0).all(2).all(0)
    unreached = tuple(n for n, zero in zip(plan.parameters, silent, strict=True) if zero)
    uncovered = tuple(n for n in plan.parameters if n not in rules and n not in unreached)
    return Check(
        kinds=_by_kind(list(plan.parameters), rules, found, TOLERANCE[dtype]),
        coverage=plan.coverage(uncovered),
        uncovered=uncovered,
        unreached=unreached,
        dtype=dtype_name(dtype),
        wider=None if found.wider is None else dtype_name(found.wider),
        tolerance=TOLERANCE[dtype],
        layout=layout,
        objectives=tuple(str(objective) for objective in chosen),
        n_samples=len(sample_set),
        n_tokens=sum(len(sample.answer) for sample in sample_set.samples),
        own_loss=own,
        rounding_measured=found.rounding is not None,
    )


def _check_finite(plain: Numbers, plan: Plan) -> None:
    """Raise `NonFiniteError` naming the first parameter whose gradient is not finite."""
    bad = ~(torch.isfinite(plain.norms).all(1) & torch.isfinite(plain.effects).all(2).all(0))
    if bad.any():
        name = list(plan.parameters)[int(bad.nonzero()[0])]
        raise NonFiniteError(
            f"the gradient at {name} is not finite, also by plain autograd",
            remedy="check the data and the model's precision",
        )


def _check_objectives(
    objectives: Sequence[Objective], found: _Comparison, dtype: torch.dtype
) -> None:
    """Raise `InputError` naming the first objective whose effects are only rounding errors."""
    plain, rounding = found.plain, found.rounding
    # Objectives are computed in at least fp32; one at its minimum has a gradient of about 0.02 eps.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for k, (objective, effects) in enumerate(zip(objectives, plain.effects, strict=True)):
        size = float(effects.abs().max())
        noise = eps * float(plain.products.abs().max())
        if rounding is not None:
            noise = max(noise, float(rounding[0][1][:, k].max()) / NOISE)
        if size <= noise:
            raise InputError(
                f"objective '{objective}' has no gradient on these samples but rounding, so there "
                "is nothing to compare; give another, or a reference model that is not the model"
            )


# ---- errors, and the part of them that is rounding ----

Errors = tuple[Tensor, Tensor]
"""Relative and absolute errors of one quantity, both `(P, K, C)`; K is 1 except for effects."""


@dataclass(frozen=True)
class _Comparison:
    """The captured numbers' errors, and the numbers of plain autograd that they are measured by.

    Attributes:
        plain: numbers of plain autograd, in the model's precision where that was computed, else in
            the wider one.
        errors: of the captured numbers, in the order of `QUANTITIES`.
        rounding: errors of plain autograd in the model's precision, in the same order; None where
            they were not needed.
        wider: the precision that errors are measured against; None: the model's own.
    """

    plain: Numbers
    errors: list[Errors]
    rounding: list[Errors] | None = None
    wider: torch.dtype | None = None


def _compared(
    ours: Numbers, plain_in: Callable[[torch.dtype], Numbers], dtype: torch.dtype, plan: Plan
) -> _Comparison:
    """Compare by as few passes of plain autograd as are enough to tell rounding from a deviation.

    Where errors are within the tolerance, plain autograd's own rounding does not matter. Errors in
    fp32 are then measured against plain autograd in fp32. Errors in 16 bits are measured against
    plain autograd in fp32, since the rounding of 16 bits is larger than the tolerance.
    """
    wider, tolerance = WIDER.get(dtype), TOLERANCE[dtype]
    if wider is None or dtype == torch.float32:
        plain = plain_in(dtype)
        _check_finite(plain, plan)
        errors = _errors(ours, plain)
        if wider is None or all(bool((e <= tolerance).all()) for e, _ in errors):
            return _Comparison(plain, errors)
        exact = plain_in(wider)
    else:
        exact = plain_in(wider)
        errors = _errors(ours, exact)
        if all(_root_mean_square(e[p]) <= tolerance for e, _ in errors for p in range(len(e))):
            return _Comparison(exact, errors, wider=wider)
        plain = plain_in(dtype)
        _check_finite(plain, plan)
    return _Comparison(plain, _errors(ours, exact), _errors(plain, exact), wider)


def _errors(ours: Numbers, exact: Numbers) -> list[Errors]:
    """The errors of each of `QUANTITIES`."""
    found = []
    for quantity in QUANTITIES:
        x, y = getattr(ours, quantity), getattr(exact, quantity)
        if quantity == "effects":
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        else:
            x, y = x.flatten(1)[:, None], y.flatten(1)[:, None]
        scale = y.abs().amax(2, keepdim=True)
        small = SMALL if quantity == "norms" else SMALL**2  # two gradients are multiplied
        scale = torch.maximum(scale, small * scale.amax(0, keepdim=True))
        off = (x - y).abs().nan_to_num(nan=torch.inf)
        found.append((off / scale.clamp(min=torch.finfo(torch.float64).tiny), off))
    return found


def _by_kind(
    names: Sequence[str],
    rules: Mapping[str, tuple[str, ...]],
    found: _Comparison,
    tolerance: float,
) -> tuple[KindCheck, ...]:
    """The comparison of each kind of parameter, in the order of the model."""
    # The largest error against a wider precision is a matter of chance.
    measure = _largest if found.wider is None else _root_mean_square
    members: dict[str, list[int]] = {}
    for p, name in enumerate(names):
        members.setdefault(kind_of(name), []).append(p)
    rows = []
    for kind, at in members.items():
        relative = [error[at] for error, _ in found.errors]
        limit = [tolerance] * len(QUANTITIES)
        if found.rounding is not None:
            limit = [tolerance + ALLOWANCE * _root_mean_square(r[at]) for r, _ in found.rounding]
        excess = [
            max(measure(error[i]) / most for error, most in zip(relative, limit, strict=True))
            for i in range(len(at))
        ]
        values = {
            "relative": map(_largest, relative),
            "absolute": (_largest(error[at]) for _, error in found.errors),
            "judged": map(measure, relative),
            "limit": limit,
        }
        rows.append(
            KindCheck(
                kind=kind,
                rules=tuple(dict.fromkeys(rule for p in at for rule in rules.get(names[p], ()))),
                n_parameters=len(at),
                worst=names[at[excess.index(max(excess))]],
                **{key: dict(zip(QUANTITIES, each, strict=True)) for key, each in values.items()},
            )
        )
    return tuple(rows)


def _largest(errors: Tensor) -> float:
    return float(errors.max())


def _root_mean_square(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())

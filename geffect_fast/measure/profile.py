"""`profile`: effects of objectives on the risks of a model, with names on every axis."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from geffect_fast.arguments import with_settings
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.measure.profiler import Profiler
from geffect_fast.measure.step_metric import StepMetric, check_metric, step_objective
from geffect_fast.objectives import Objective, resolve
from geffect_fast.ranks import on_all_ranks
from geffect_fast.results.form import REFERENCE_IS_MODEL
from geffect_fast.settings import Measuring

if TYPE_CHECKING:
    import xarray as xr


@with_settings(Measuring)
@on_all_ranks
def profile(
    model: nn.Module,
    tokenizer: Any,
    *,
    forget: Any,
    retain: Any,
    objectives: Sequence[str | Objective] | str,
    probes: Mapping[str, Any] | None = None,
    refusals: Any = None,
    reference_model: nn.Module | str | Path | None = None,
    metric: str | Mapping[str, Tensor] | None = None,
    optimizer: Any = None,
    step_of: str | Objective | None = None,
    second_order: bool = False,
    conflicts: bool = False,
    out: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """The G-effect of unlearning objectives on a model's risks: by parameter, sample, position.

        e = < grad R(D), grad L(D_u) >

    A descent step of size `lr` on `L` changes the risk `R(D)` by `-lr e` to first order. Wanted:
    `e` strongly negative for the risk on what must go (`unlearn`), zero or positive elsewhere
    (`retain`).

    Args:
        model: a causal language model of transformers in eval mode; trainable parameters are
            profiled, frozen ones skipped. It is left as it was.
        tokenizer: of transformers; None for samples that are tokenised already.
        forget: what must go: a path to JSON or JSON lines of `question` and `answer`, a hub id, a
            list of dicts, a torch Dataset, or tokenised samples (`input_ids`, unshifted `labels`).
        retain: what must stay, likewise.
        objectives: strings such as `npo(beta=0.1) + 1.0*kl`, or `geffect_fast.objectives` objects.
        probes: further data sets by name, each a risk of its own.
        refusals: answers that po, dpo and altpo put in place of the forget set's, where a row has
            no field `alternative`, one or a list, of its own.
        reference_model: what NPO-like objectives compare with, a model or the folder of one; None:
            `model` as it is. A reference with the model's own weights brings a `GEffectWarning`,
            since betas only scale then.
        metric: of the step that is really taken (docs/concepts.md). Effects are then
            `e_P = <grad R, P grad L>` with the `P` of `sgd`, `adam`, `adamw` or `lion`, or with a
            diagonal that is given, a tensor for every trainable parameter by name. None: plain.
        optimizer: the optimizer whose state `P` is made from: a live one of the model's parameters,
            its file `optimizer.pt`, or the checkpoint's folder; None: as in a first step.
        step_of: the objective whose step is taken, for a `P` that depends on its gradient (all but
            sgd's do). None: the only objective; for several, `P` is formed with the mean of their
            squared gradients.
        second_order: also `step_curvature`, `u^T H u` of each risk along each objective's step `u`,
            by two backwards for each risk and objective through one forward of the risk's data.
        conflicts: also `conflict_share`, the part of an objective's gradient, by the sizes of its
            elements, whose sign opposes the retain risk's, and `fisher_trace`; by position also
            `place_conflict_share`.
        out: a NetCDF file that effects by sample and position or token are written to while they
            are computed, for results larger than memory; None: the result is held in memory.
        progress: show a bar.
        settings:

    Returns:
        A Dataset with `g_effect` (objective, risk, parameter, sample), `risk_value` (risk), `loss`
        (objective), and with `norms` `grad_norm` (objective), `risk_grad_norm` (risk), `cosine`
        (objective, risk) of the whole gradients and the same per parameter under `parameter_*`, or
        per group under `group_*`. All fp64.

        By sample there are also intervals by the choice of the rows, which hold `interval_level` of
        all draws (`geffect_fast.results.intervals`; docs/concepts.md): `g_effect_low` and
        `g_effect_high` (objective, risk) of total effects, `risk_value_low` and `risk_value_high`
        (risk), and `collateral` (objective), the rise of the worst other risk for a unit rise of
        the forget risk, with `collateral_low` and `collateral_high`. Bounds are NaN where a data
        set has one row.

        Coordinates: `parameter` with `block`, `kind`, `group`; `sample` (row number) with `set` and
        `question`; `position` counts the tokens of a sample's answer and then of its alternatives,
        `token` those that have a label, with `token_id`, `token_text` and `sequence` (0: the
        answer) on (sample, position) or (sample, token). Beyond a sample's end effects are 0 and
        ids -1.

        Attributes say what is covered (`covered_parameters` of `trainable_parameters`, the same in
        elements, `frozen_*`, `tied`), and whether the shares were compared with whole gradients
        (`coverage_checked`). For a 16-bit model attributes also say how far effects can be trusted.
        `precision_error` is the relative error that effects may have: thrice the change by fp32 on
        the same weights at two rows (`precision_samples`, of the forget rows; the formula is in
        docs/concepts.md). `precision_note` stands in its place where it was not measured, and says
        why. Reports call no numbers different that differ by less. With `out` the Dataset reads
        from the file; close it after use.

        With `metric` effects, norms, cosines and intervals are in that metric. Beside them, in the
        same units, stand `momentum_effect` and `decay_effect` (risk, and parameter or group), which
        earlier gradients and weight decay add to the step whatever the objective; `step_total`
        (objective, risk), a risk's gradient times the whole step; and where the learning rate is
        known `step_learning_rate` and `predicted_change`, `-lr` times `step_total`. The attributes
        are `metric`, `metric_state`, which says what `P` is made from, and `metric_of`.

        With `second_order` there is `step_curvature` (objective, risk). A step `-lr u` changes a
        risk to second order by a further `lr**2 / 2` times `step_curvature`, where `u` is the
        optimizer's whole step with `metric`, and the plain gradient without. Where the learning
        rate is known, `predicted_change_second` is the change of both orders.

        With `conflicts`, by parameter or group: `conflict_share` (objective), the sizes of the
        elements of the objective's gradient whose sign opposes the retain risk's, over
        `gradient_mass` (objective), the sizes of all elements; a descent along the opposing ones
        raises the retain risk. `conflict_share` is NaN where the gradient is zero. `fisher_trace`
        (risk) is the trace of the risk's empirical Fisher matrix: the summed squares of its rows'
        gradients, none of which is formed.

        With `conflicts` and `position` also `place_mass` (objective, and all axes but `risk`), the
        sizes of the elements of the gradient at each place, one token of one row, and
        `place_conflict_share`, the part of `place_mass` whose sign opposes the whole retain risk's
        gradient; NaN where the mass is zero. Places cancel in the whole gradient, so their masses
        add up to more than `gradient_mass`. Over an axis that is summed, masses are added up.

        The attribute `reference_is_model` is 1 where an objective compares with a reference that is
        the model itself. The attribute `own_loss` is there where the model's own loss is not the
        risk: `unshifted` (labels at their own places), `auxiliary` (for instance with the routers'
        loss) or `other`. `own_loss_difference` is the own loss less the risk on a short sequence,
        in nats a token, and `own_loss_note` a sentence, which is a `GEffectWarning` too.

    Raises:
        InputError: unusable data, objective or argument, in one line.
        NonFiniteError: a weight, gradient or effect is not finite; the first is named.
        UnsupportedModelError: a module's share cannot be attributed exactly, or has no derivative
            in the engine that is needed; it is named.

    Examples:
        >>> result = gf.profile(model, tokenizer, forget="forget.jsonl", retain="retain.jsonl",
        ...                     objectives=["ga", "npo(beta=0.1)"])
        >>> result.g_effect.sum(["parameter", "sample"])
    """
    for name, given in (("optimizer", optimizer), ("step_of", step_of)):
        if metric is None and given is not None:
            raise InputError(f"{name}: goes with metric; give metric='adam', or leave it out")
    if isinstance(metric, str):
        check_metric(metric)
    profiler = Profiler.of(
        model,
        tokenizer,
        forget=forget,
        retain=retain,
        objectives=objectives,
        probes=probes,
        refusals=refusals,
        reference_model=reference_model,
        **settings,
    )
    step = None
    if metric is not None:
        plan = profiler.plan
        step = step_objective(
            StepMetric.of(metric, optimizer, plan.model, plan.at_rest),
            None if step_of is None else resolve(step_of),
            profiler.objectives,
        )
    result = profiler.measure(
        out=out,
        progress=progress,
        unchanged=True,
        step=step,
        second_order=second_order,
        conflicts=conflicts,
    ).dataset
    if profiler.own_loss is not None:
        warnings.warn(f"model: {profiler.own_loss}", GEffectWarning, stacklevel=3)
    if "reference_is_model" in result.attrs:
        warnings.warn(f"reference: {REFERENCE_IS_MODEL}", GEffectWarning, stacklevel=3)
    return result

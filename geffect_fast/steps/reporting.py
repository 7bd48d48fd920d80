"""Logging of a probe's numbers to a Trainer's `report_to`, such as TensorBoard or W&B.

The numbers go the way of the Trainer's own loss, so all its reporters get them. Most reporters put
`train/` in front of the names.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from geffect_fast.results.intervals import NEGLIGIBLE, collateral_of
from geffect_fast.results.risks import effect_name
from geffect_fast.steps.probe import total_effect

if TYPE_CHECKING:
    import xarray as xr

PREFIX = "geffect"


def logged_values(dataset: xr.Dataset) -> dict[str, float]:
    """The numbers of a probe by the names under which they are logged.

    Every risk has its value: `geffect/risk_unlearn`, `geffect/risk_retain`, `geffect/risk_NAME`.
    The objective that is trained on, or the only one, has `geffect/e_u`, `geffect/e_r`,
    `geffect/e_NAME` and `geffect/collateral`; every other objective has the same names followed by
    `/OBJECTIVE`. Numbers that are not defined, such as the collateral of an objective that does not
    forget, are left out.

    Args:
        dataset: the result of one step.
    """
    risks = [str(risk) for risk in dataset["risk"].values]
    objectives = [str(objective) for objective in dataset["objective"].values]
    effects = total_effect(dataset).transpose("objective", "risk").values
    largest = np.abs(effects[np.isfinite(effects)]).max(initial=0.0)
    collateral = collateral_of(effects, NEGLIGIBLE * largest)
    lead = dataset.attrs.get("trained_objective", objectives[0] if len(objectives) == 1 else None)
    values = dict(
        zip([f"risk_{risk}" for risk in risks], dataset["risk_value"].values, strict=True)
    )
    for objective, of, harm in zip(objectives, effects, collateral, strict=True):
        behind = "" if objective == lead else f"/{objective}"
        # In reverse, so that e_u is set last, and a probe named u does not replace it.
        for risk, effect in reversed([*zip(risks, of, strict=True)]):
            values[f"{effect_name(risk)}{behind}"] = effect
        values[f"collateral{behind}"] = harm
    return {f"{PREFIX}/{name}": float(x) for name, x in values.items() if math.isfinite(x)}


def report(
    values: Mapping[str, float],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
) -> None:
    """Log numbers once at a Trainer's current step; a callback of that Trainer must call this.

    Numbers that the Trainer's history already has at this step are not logged again. The history is
    in the Trainer's checkpoints, so this holds also after the training was resumed.
    """
    handler = _handler()
    if handler is None or any(
        entry.get("step") == state.global_step and values.keys() <= entry.keys()
        for entry in state.log_history
    ):
        return
    logs = dict(values) if state.epoch is None else {**values, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    # Not `Trainer.log`: subclasses override it to add values that they gathered, and reset them.
    due = control.should_log
    handler.on_log(args, state, control, logs)
    control.should_log = due  # the Trainer's own loss may be due at the same step


def _handler() -> CallbackHandler | None:
    """The `CallbackHandler` of the Trainer whose callback is running; None outside of a Trainer.

    The handler is found in the call stack, since a Trainer gives its callbacks neither itself nor
    the handler.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == CallbackHandler.__module__:
            found = frame.f_locals.get("self")
            return found if isinstance(found, CallbackHandler) else None
    return None

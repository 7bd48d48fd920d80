"""What a probe says to a Trainer's `report_to`: TensorBoard, W&B, whatever listens to its logs.

A number goes the way of the Trainer's own loss, so all of its reporters get it; `train/`, which
most of them put in front of names, is theirs.
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

    Of every risk its value, `geffect/risk_unlearn`, `geffect/risk_retain`, `geffect/risk_NAME`; of
    the objective trained on, or the only one, `geffect/e_u`, `geffect/e_r`, `geffect/e_NAME` and
    `geffect/collateral`; of every other objective the same with `/OBJECTIVE` behind. What is not
    defined, such as the collateral of an objective that does not forget, is left out.

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
        # From the last, so that a probe that is called u does not take the place of e_u.
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
    """Log numbers at the step a Trainer is at, once; called by a callback of that Trainer.

    The Trainer's history, which its checkpoints hold, says what was logged before it was resumed.
    """
    handler = _handler()
    if handler is None or any(
        entry.get("step") == state.global_step and values.keys() <= entry.keys()
        for entry in state.log_history
    ):
        return
    logs = dict(values) if state.epoch is None else {**values, "epoch": state.epoch}
    state.log_history.append({**logs, "step": state.global_step})
    # Not `Trainer.log`: others override it to add, and let go of, what they have gathered.
    due = control.should_log
    handler.on_log(args, state, control, logs)
    control.should_log = due  # the Trainer's own loss may be due at the same step


def _handler() -> CallbackHandler | None:
    """What tells the callbacks of the Trainer that called the callback that called; if one did.

    It is looked for in the calls above, since a Trainer hands its callbacks neither itself nor it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == CallbackHandler.__module__:
            found = frame.f_locals.get("self")
            return found if isinstance(found, CallbackHandler) else None
    return None

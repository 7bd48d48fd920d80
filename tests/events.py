"""Scalars that TensorBoard shows of a folder, and a result's numbers under the same names."""

from __future__ import annotations

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from geffect_fast.results.risks import effect_name


def scalars(folder):
    """The steps and values of every tag's points, in the order in which TensorBoard shows them."""
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    shown.Reload()
    return {
        tag: [(point.step, point.value) for point in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


def of_probes(found):
    """The points of probes alone, by their names without the prefix that transformers adds."""
    front = "train/geffect/"
    return {t.removeprefix(front): points for t, points in found.items() if t.startswith(front)}


def expected(result, lead):
    """The same points as a result has them, rounded to fp32 as in event files."""
    effects = result.g_effect.sum([d for d in ("parameter", "group", "sample") if d in result.dims])
    series = {f"risk_{risk}": result.risk_value.sel(risk=risk) for risk in result.risk.values}
    for objective in result.objective.values:
        behind = "" if objective == lead else f"/{objective}"
        of = effects.sel(objective=objective)
        for risk in result.risk.values:
            series.setdefault(f"{effect_name(risk)}{behind}", of.sel(risk=risk))
        others = of.drop_sel(risk="unlearn") / of.sel(risk="unlearn")
        series[f"collateral{behind}"] = others.max("risk").where(of.sel(risk="unlearn") < 0)
    steps = result.step.values.tolist()
    pairs = {name: zip(steps, values.values, strict=True) for name, values in series.items()}
    known = {n: [(s, float(np.float32(x))) for s, x in p if x == x] for n, p in pairs.items()}
    return {name: points for name, points in known.items() if points}


class Listener(TrainerCallback):
    """A stand-in for the callback by which transformers tells a reporter."""

    heard: list = []  # noqa: RUF012 - transformers makes the instance

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append((state.global_step, dict(logs)))

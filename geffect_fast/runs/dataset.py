"""From numbers to an `xarray.Dataset` with names on every axis, checked on the way."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast import ops
from geffect_fast.capture import Plan
from geffect_fast.errors import NonFiniteError, UnsupportedModelError
from geffect_fast.runs.axes import parameter_coordinates

if TYPE_CHECKING:
    import xarray as xr

COVERAGE_TOLERANCE = {
    torch.float64: 1e-7,
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-2,
}
"""How far the sum over samples may be from the whole gradient's product, relative to both norms."""


def gram_matrices(directions: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """Gram matrices `(P, M + K, M + K)` fp64 of the risks' and the objectives' gradients."""
    stacked = [(directions[name], gradients[name]) for name in directions]
    m, k = stacked[0][0].shape[0], stacked[0][1].shape[0]
    lists = [[d[i] for d, _ in stacked] for i in range(m)]
    lists += [[g[i] for _, g in stacked] for i in range(k)]
    return ops.multi_tensor_gram(lists).double().cpu()


def check_directions(x: Tensor, what: str, names: Sequence[str]) -> None:
    """Raise `NonFiniteError` naming the first row of `x` that is not finite, `what` of its name."""
    good = torch.isfinite(x.flatten(1)).all(1)
    if not good.all():
        name = names[int((~good).nonzero()[0])]
        raise NonFiniteError(
            f"{what.format(name)} is not finite; check the data and the model's precision"
        )


def check_effects(effects: Tensor, values: Tensor, objectives: Sequence[str], plan: Plan) -> None:
    """Raise `NonFiniteError` naming the first objective and parameter that are not finite."""
    for objective, value in zip(objectives, values.tolist(), strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the value of objective '{objective}' is {value}; check its hyper-parameters and "
                "the model's precision"
            )
    bad = (
        ~torch.isfinite(effects).flatten(3).all(-1)
        if effects.dim() == 4
        else ~torch.isfinite(effects)
    )
    if bad.any():
        k, _, p = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"gradient of objective '{objectives[k]}' at {list(plan.parameters)[p]} is not finite; "
            "check its hyper-parameters and the model's precision"
        )


def check_coverage(plan: Plan, effects: Tensor, gram: Tensor, m: int) -> None:
    """The samples' shares must add up to the whole gradient's product, or a use was missed."""
    whole = gram[:, m:, :m].permute(1, 2, 0)
    square = gram.diagonal(dim1=1, dim2=2)
    scale = (square[:, m:, None] * square[:, None, :m]).sqrt().permute(1, 2, 0)
    # A gradient that is rounding noise beside the model's has a direction of noise.
    floor = 1e-6 * scale.amax(dim=-1, keepdim=True)
    worst = ((effects - whole).abs() / (scale + floor).clamp(min=1e-300)).amax(dim=(0, 1))
    p = int(worst.argmax())
    name = list(plan.parameters)[p]
    if worst[p] > COVERAGE_TOLERANCE[plan.parameters[name].dtype]:
        raise UnsupportedModelError(
            f"parameter '{name}': the samples' shares miss its gradient by {float(worst[p]):.1%}; "
            "the model uses it outside its module's forward. Freeze it, or resolve without 'sample'"
        )


def dataset(
    effects: Tensor,
    axes: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    samples: Sequence[tuple[int, str, str]],
    risk_values: Tensor,
    losses: Tensor,
    gram: Tensor | None,
    settings: Mapping[str, Any],
) -> xr.Dataset:
    """The result: every number under its name on every axis that was asked for.

    Args:
        effects: `(K, M, P)` or `(K, M, P, N)` fp64.
        axes: of `parameter` and `sample`, those to keep.
        labels: names along `objective`, `risk` and `parameter`.
        samples: row number, set and question of each sample.
        risk_values: `(M,)`.
        losses: `(K,)`.
        gram: `(P, M + K, M + K)` of risks and then objectives; None: no norms.
        settings: attributes of the result.
    """
    import xarray as xr

    dims = ["objective", "risk", "parameter"] + (["sample"] if effects.dim() == 4 else [])
    g_effect = xr.DataArray(effects.numpy(), dims=dims)
    if "parameter" not in axes:
        g_effect = g_effect.sum("parameter")
    variables: dict[str, Any] = {
        "g_effect": g_effect,
        "risk_value": ("risk", risk_values.numpy()),
        "loss": ("objective", losses.numpy()),
    }
    if gram is not None:
        variables |= _norm_variables(gram, len(labels["risk"]), "parameter" in axes)
    coords: dict[str, Any] = {d: list(labels[d]) for d in ("objective", "risk")}
    if "parameter" in axes:
        coords |= parameter_coordinates(labels["parameter"])
    if "sample" in g_effect.dims:
        rows, sets, questions = zip(*samples, strict=True)
        coords |= {
            "sample": np.array(rows),
            "set": ("sample", list(sets)),
            "question": ("sample", list(questions)),
        }
    attrs = dict(settings) | {
        "versions": json.dumps(_versions()),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def _norm_variables(gram: Tensor, m: int, per_parameter: bool) -> dict[str, Any]:
    def of(g: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        norm = g.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        product = norm[..., m:, None] * norm[..., None, :m]
        cosine = torch.where(product > 0, g[..., m:, :m] / product, torch.nan)
        return norm[..., m:].numpy(), norm[..., :m].numpy(), cosine.numpy()

    objective, risk, cosine = of(gram.sum(0))
    variables: dict[str, Any] = {
        "grad_norm": ("objective", objective),
        "risk_grad_norm": ("risk", risk),
        "cosine": (("objective", "risk"), cosine),
    }
    if per_parameter:
        objective, risk, cosine = of(gram)
        variables |= {
            "parameter_grad_norm": (("parameter", "objective"), objective),
            "parameter_risk_grad_norm": (("parameter", "risk"), risk),
            "parameter_cosine": (("parameter", "objective", "risk"), cosine),
        }
    return variables


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in ("geffect-fast", "torch", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions

"""The result of a profile as an `xarray.Dataset` with names on every axis, and its checks."""

from __future__ import annotations

import hashlib
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
from geffect_fast.data import SampleSet
from geffect_fast.engines.directions import rows_of
from geffect_fast.errors import NonFiniteError, UnsupportedModelError
from geffect_fast.objectives import Objective
from geffect_fast.results.axes import Resolution
from geffect_fast.transfer import OnItsWay, are_finite

if TYPE_CHECKING:
    import xarray as xr

COVERAGE_TOLERANCE = {
    torch.float64: 1e-5,  # of models that compute norms in fp32
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-2,
}
"""Largest error of the sum over samples, relative to the norms of the two whole gradients."""

SHORTEST = 2.0**-48
"""The shortest norm that errors are compared with. Such a gradient is negligible beside that of a
loss of 1, and fp32 cannot hold the square of a shorter one: the square for wga at a large alpha,
whose weights are nearly 0, comes out as 0."""


def digest(samples: SampleSet) -> str:
    """A hash of a data set's rows, by the tokens and labels of their answers."""
    found = hashlib.sha256()
    for sample in samples.samples:
        for tensor in (sample.answer.input_ids, sample.answer.labels):
            found.update(tensor.numpy().astype("<i8").tobytes() + b";")
    return found.hexdigest()[:16]


def digests(sets: Mapping[str, SampleSet]) -> dict[str, str]:
    """The `digest` of data sets by name."""
    return {name: digest(each) for name, each in sets.items()}


def gram_matrices(*gradients: Mapping[str, Tensor]) -> Tensor:
    """Gram matrices `(P, n, n)` fp64 of gradients, such as the risks' and then the objectives'.

    Args:
        gradients: `(n_i, *shape)` by parameter; `n` is the sum of the `n_i`.
    """
    lists = [row for of in gradients for row in rows_of(of)]
    (gram,) = OnItsWay(ops.multi_tensor_gram(lists)).arrived()
    return gram.double()


def check_gradients(gradients: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise `NonFiniteError` naming the first gradient that is not finite, and its parameter.

    Args:
        gradients: of the risks, or of objectives, `(n, *shape)` by parameter.
        names: the names of the n risks or objectives.
    """
    for parameter, good in zip(gradients, are_finite(list(gradients.values())), strict=True):
        if not good:
            rows = torch.isfinite(gradients[parameter].flatten(1)).all(1).tolist()
            raise NonFiniteError(
                f"gradient of {names[rows.index(False)]} at {parameter} is not finite",
                remedy="check the data and the model's precision",
            )


def check_effects(
    effects: Tensor, values: Tensor, objectives: Sequence[Objective], places: Sequence[str]
) -> None:
    """Raise `NonFiniteError` naming the first objective and parameter that are not finite.

    Args:
        effects: `(K, M, C)`, summed over samples.
        values: `(K,)`.
        objectives: the K objectives or their parts.
        places: names of the C parameters, or groups of them.
    """
    for objective, value in zip(objectives, values.tolist(), strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the value of objective '{objective}' is {value}",
                remedy="check its hyper-parameters and the model's precision",
            )
    bad = ~torch.isfinite(effects)
    if bad.any():
        k, _, p = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"gradient of objective '{objectives[k]}' at {places[p]} is not finite",
            remedy="check its hyper-parameters and the model's precision",
        )


def check_norms(gram: Tensor, names: Sequence[object]) -> None:
    """Raise `NonFiniteError` naming the first whole gradient whose squared norm is not finite.

    Args:
        gram: Gram matrices `(P, n, n)`, by parameter.
        names: the names of the n gradients.
    """
    good = torch.isfinite(gram.diagonal(dim1=1, dim2=2)).all(0)
    if not good.all():
        name = names[int((~good).nonzero()[0])]
        raise NonFiniteError(
            f"the norm of the gradient of '{name}' is not finite",
            remedy="check its coefficients and hyper-parameters",
        )


def check_coverage(plan: Plan, effects: Tensor, gram: Tensor, m: int) -> None:
    """Check that the samples' shares add up to the product with the whole gradient.

    Where they do not, a use of a parameter was missed.

    Args:
        plan: the model's plan.
        effects: sums of the samples' shares, `(K, M, P)`.
        gram: Gram matrices `(P, M + K, M + K)` of the risks' and then the objectives' gradients.
        m: the number of risks, M.

    Raises:
        UnsupportedModelError: naming the parameter that misses most.
    """
    whole = gram[:, m:, :m].permute(1, 2, 0)
    square = gram.diagonal(dim1=1, dim2=2)
    if any(p.dtype != torch.float64 for p in plan.parameters.values()):
        square = square.clamp(min=SHORTEST**2)
    scale = (square[:, m:, None] * square[:, None, :m]).sqrt().permute(1, 2, 0)
    # A parameter's gradient that is mere rounding beside the whole model's has a random direction.
    floor = 1e-6 * scale.amax(dim=-1, keepdim=True)
    worst = ((effects - whole).abs() / (scale + floor).clamp(min=1e-300)).amax(dim=(0, 1))
    p = int(worst.argmax())
    name = list(plan.parameters)[p]
    dtype, kind = plan.parameters[name].dtype, plan.parameters[name].device.type
    if torch.is_autocast_enabled(kind):  # gradients were rounded to autocast's precision
        dtype = torch.get_autocast_dtype(kind)
    if worst[p] > COVERAGE_TOLERANCE[dtype]:
        raise UnsupportedModelError(
            f"parameter '{name}': the samples' shares miss {float(worst[p]):.2g} of its gradient; "
            "the model uses it outside its module's forward. Freeze it, or resolve without 'sample'"
        )


def dataset(
    resolution: Resolution,
    effects: np.ndarray | None,
    objectives: Sequence[str],
    risks: Sequence[str],
    risk_values: Tensor,
    losses: Tensor,
    gram: Tensor | None,
    tokenizer: Any,
    settings: Mapping[str, Any],
) -> xr.Dataset:
    """The result as a Dataset: effects, risks, losses and norms, with names along every axis.

    Args:
        resolution: the axes.
        effects: `resolution.shape(K, M)` fp64; None where they are in a file already.
        objectives, risks: names along these axes.
        risk_values: `(M,)`.
        losses: `(K,)`.
        gram: Gram matrices `(P, M + K, M + K)` of the gradients of risks and then objectives, or
            `(P, M, M)` of risks alone; None for a result without norms.
        tokenizer: gives the text of tokens or positions; None for their ids only.
        settings: attributes of the result.
    """
    import xarray as xr

    variables: dict[str, Any] = {
        "risk_value": ("risk", risk_values.numpy()),
        "loss": ("objective", losses.numpy()),
    }
    if effects is not None:
        variables = {"g_effect": (resolution.dims, resolution.kept(effects))} | variables
    if gram is not None:
        variables |= _norm_variables(gram, len(risks), resolution)
    coords = {"objective": list(objectives), "risk": list(risks)}
    attrs = dict(settings) | {
        "versions": json.dumps(versions()),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return xr.Dataset(variables, coords | resolution.coordinates(tokenizer), attrs)


def _norm_variables(gram: Tensor, m: int, resolution: Resolution) -> dict[str, Any]:
    """Variables with norms and cosines of whole gradients, and by parameter or group if an axis."""

    def of(g: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        norm = g.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        product = norm[..., m:, None] * norm[..., None, :m]
        # The cosine of parallel gradients may come out slightly beyond 1 by rounding.
        cosine = torch.where(product > 0, (g[..., m:, :m] / product).clamp(-1, 1), torch.nan)
        return norm[..., m:].numpy(), norm[..., :m].numpy(), cosine.numpy()

    objective, risk, cosine = of(gram.sum(0))
    if gram.shape[-1] == m:
        return {"risk_grad_norm": ("risk", risk)}
    variables: dict[str, Any] = {
        "grad_norm": ("objective", objective),
        "risk_grad_norm": ("risk", risk),
        "cosine": (("objective", "risk"), cosine),
    }
    by = resolution.by_parameter_or_group
    if by is not None:
        labels, columns = resolution.columns()
        placed = gram.new_zeros(len(labels), *gram.shape[1:])
        objective, risk, cosine = of(placed.index_add_(0, torch.tensor(columns), gram))
        variables |= {
            f"{by}_grad_norm": ((by, "objective"), objective),
            f"{by}_risk_grad_norm": ((by, "risk"), risk),
            f"{by}_cosine": ((by, "objective", "risk"), cosine),
        }
    return variables


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute the numbers."""
    found = {"python": sys.version.split()[0]}
    for package in ("geffect-fast", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found

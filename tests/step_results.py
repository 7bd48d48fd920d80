"""Step results: made-up ones of any shape, and one of a real training of a tiny model."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from models import build, samples
from synthetic import make_dataset

import geffect_fast as gf


def step_dataset(
    objectives=("ga",),
    *,
    n_steps=13,
    every=1,
    trained=True,
    explodes=False,
    weights=True,
    noise=0.05,
    seed=0,
    **kwargs,
):
    """A Dataset in the form of a combined step result, with numbers from a seed.

    Risks move by the predictions and a part of second order; with `explodes`, effects grow by five
    decades.

    Args:
        objectives: the first is the trained one.
        n_steps: number of probes.
        every: number of updates between probes.
        trained: whether the run names its trained objective; else the steps are checkpoints.
        explodes: whether effects grow as GA's do.
        weights: whether there are token weights.
        noise: of the measured change, relative to the predicted one.
        seed: of all numbers.
        kwargs: of `synthetic.make_dataset`.
    """
    rng = np.random.default_rng(seed)
    base = make_dataset(objectives, seed=seed, **kwargs)
    step = np.arange(n_steps) * every
    t = np.linspace(0, 1, n_steps)
    growth = 10 ** (5 * t**2) if explodes else 1 + np.sin(3 * t)
    along = xr.DataArray(growth, {"step": step}, "step")
    axes = (1.0 + 0.3 * rng.normal(size=(n_steps, *base["g_effect"].shape[:3]))).astype(float)
    wobble = xr.DataArray(axes, dims=("step", *base["g_effect"].dims[:3]))
    effect = (base["g_effect"] * along * wobble).transpose("step", *base["g_effect"].dims)
    dataset = base.assign(g_effect=effect)
    totals = effect.sum([d for d in effect.dims if d not in ("step", "objective", "risk")])
    rate = 1e-1 / every
    changes = np.zeros((n_steps, base.sizes["risk"]))
    changes[1:] = -rate * every * totals[:-1, 0].values
    real = changes * (1 + noise * rng.normal(size=changes.shape)) + 0.02 * changes**2
    risks = 1.0 + rng.random(base.sizes["risk"]) + real.cumsum(0)
    nan_first = np.where(np.arange(n_steps) > 0, 1.0, np.nan)[:, None]
    dataset["risk_value"] = (("step", "risk"), risks)
    dataset["measured_change"] = (("step", "risk"), real * nan_first)
    dataset["predicted_update"] = (("step", "risk"), changes * 1.01 * nan_first)
    dataset["predicted_sgd"] = (("step", "risk"), changes * nan_first)
    dataset["learning_rate"] = ("step", np.full(n_steps, rate) * nan_first[:, 0])
    for name in ("loss", "grad_norm", "risk_grad_norm", "cosine"):
        dims = base[name].dims
        repeated = np.broadcast_to(base[name].values, (n_steps, *base[name].shape)).copy()
        dataset[name] = (("step", *dims), repeated)
    dataset["loss"] *= along
    dataset["grad_norm"] *= along
    dataset["cosine"] *= xr.DataArray(np.cos(t), {"step": step}, "step")
    if weights and "sample" in base.dims:
        dataset = dataset.assign(token_weight=_weights(base, along, rng))
        ids = np.where(np.isnan(dataset.token_weight.values[0, 0]), -1, 7)
        dataset = dataset.assign_coords(token_id=(("sample", "token"), ids))
    dataset.attrs["command"] = "unlearn" if trained else "profile"
    if trained:
        dataset.attrs["trained_objective"] = objectives[0]
    else:
        dataset = dataset.assign(
            {name: dataset[name] * np.nan for name in ("learning_rate", "predicted_sgd")}
        )
    return dataset


def _weights(base, along, rng):
    """Weights of 6 tokens a sample, 4 for every third sample; the second objective has none."""
    n, width = base.sizes["sample"], 6
    shape = (base.sizes["objective"], n, width)
    values = rng.lognormal(size=shape) * np.where(base["set"].values == "forget", 1, -1)[:, None]
    values[:, ::3, 4:] = np.nan
    values[1:2] = np.nan
    weights = xr.DataArray(values, dims=("objective", "sample", "token"))
    return (weights / along).transpose("step", "objective", "sample", "token")


def trained_result(*, n_steps=6, rate=2e-2, resolve=("group", "sample")):
    """A tiny model that ascends its forget data by SGD, profiled at every step.

    Returns:
        A Dataset of `ga`, with predictions of this run.
    """
    model = build("llama", dtype=torch.float64)
    forget, retain = samples([9, 7, 11], seed=1), samples([8, 10], seed=2)
    found = []
    for step in range(n_steps):
        one = gf.profile(
            model, None, forget=forget, retain=retain, objectives="ga",
            resolve=resolve,
        )  # fmt: skip
        found.append(one.assign_coords(step=step))
        model.zero_grad()
        total, count = 0.0, 0
        for row in forget:
            labels = torch.tensor([row["labels"]])
            logits = model(torch.tensor([row["input_ids"]])).logits[:, :-1]
            total = total - torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            count += int((labels[:, 1:] >= 0).sum())
        (total / count).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * (0 if p.grad is None else p.grad)
    data = [one.drop_vars("parameter", errors="ignore") for one in found]
    dataset = xr.concat(data, "step", combine_attrs="drop_conflicts")
    effect = dataset["g_effect"]
    totals = effect.sum([d for d in effect.dims if d not in ("step", "objective", "risk")])
    predicted = (-rate * totals.sel(objective="ga", drop=True)).shift(step=1)
    dataset["measured_change"] = dataset["risk_value"].diff("step").reindex(step=dataset.step)
    dataset["predicted_sgd"] = dataset["predicted_update"] = predicted.transpose("step", "risk")
    dataset["learning_rate"] = ("step", np.where(np.arange(n_steps) > 0, rate, np.nan))
    return dataset.assign_attrs(command="unlearn", trained_objective="ga")

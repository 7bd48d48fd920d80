"""A profile's numbers are those of one process, whatever the number of ranks."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from models import build, fp64_throughout, samples
from ranked import on_ranks

import geffect_fast as gf

LENGTHS = {"forget": [5, 9, 7, 4, 12], "retain": [8, 6, 6], "general": [7]}
OBJECTIVES = ["ga", "npo(beta=0.5)", "ga + 0.5*kl", "rmu(layer=2)"]
"""One reads forget rows only, one has a reference, one is a sum over both sets, one reads a layer.

`test_every_objective_on_ranks.py` has all others."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def data(lengths=LENGTHS):
    rows = {name: samples(n, seed) for seed, (name, n) in enumerate(lengths.items())}
    general = {"probes": {"general": rows.pop("general")}} if "general" in rows else {}
    return rows | general


def profiled(architecture, dtype, lengths=LENGTHS, model=None, **settings):
    model = build(architecture, dtype) if model is None else model
    given = {"objectives": OBJECTIVES, "reference_model": build(architecture, dtype, seed=7)}
    given |= {"resolve": ("parameter", "sample"), "token_budget": 24} | settings
    with fp64_throughout() if dtype == torch.float64 else nullcontext():
        return gf.profile(model, None, **data(lengths), **given)


CASES = {
    "fp32": ("llama", torch.float32, {}),
    "tied": ("llama_tied", torch.float64, {}),
    "gpt2": ("gpt2", torch.float64, {}),
    "experts": ("qwen2_moe", torch.float64, {}),
    "token": ("llama", torch.float64, {"resolve": ("group", "sample", "token")}),
    "position": ("llama", torch.float64, {"resolve": ("sample", "position"), "conflicts": True}),
    "sums": ("llama", torch.float64, {"resolve": ("parameter",), "metric": "adam"}),
    "forward": ("llama", torch.float64, {"engine": "forward", "resolve": ("sample",)}),
    "curved": ("llama", torch.float64, {"second_order": True, "reduction": "sample"}),
    "few": ("llama", torch.float64, {"lengths": {"forget": [5], "retain": [8, 3, 9]}}),
}


KINDS = ("fp32", "tied", "gpt2", "experts")
"""Kinds of models, which are tested on every number of ranks."""
ON_FOUR = (*KINDS, "token", "curved", "few")
ON_TWO = tuple(name for name in CASES if name in KINDS or name not in ON_FOUR)


def of_cases(names):
    found = {}
    for name in names:
        *args, more = CASES[name]
        found[name] = profiled(*args, **more)
    return found


def assert_same(one, other, tolerance):
    assert one.sizes == other.sizes
    assert set(one.variables) == set(other.variables)
    for name, variable in one.variables.items():
        if variable.dtype.kind != "f":
            assert (variable.values == other[name].values).all(), name
            continue
        size = np.max(np.abs(variable.values), where=np.isfinite(variable.values), initial=0.0)
        np.testing.assert_allclose(
            other[name].values, variable.values, rtol=0, atol=tolerance * size, err_msg=name
        )
    for name in ("engine", "layout", "reduction", "token_budget", "digests", "coverage_checked"):
        assert one.attrs[name] == other.attrs[name]


@pytest.mark.parametrize(
    ("size", "names"), [(2, ON_TWO), pytest.param(4, ON_FOUR, marks=pytest.mark.slow)]
)
def test_ranks_find_what_one_process_finds(size, names):
    alone = of_cases(names)
    for found in on_ranks(size, of_cases, names):
        for name, one in alone.items():
            assert_same(one, found[name], TOLERANCE[CASES[name][1]])

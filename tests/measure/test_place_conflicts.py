"""Parts of gradients that oppose the retain risk's, place by place, against plain autograd."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from models import build, fp64_throughout, samples
from reference import mean_over, token_logprobs
from torch.utils._pytree import tree_map

import geffect_fast as gf
from geffect_fast.capture.factors import Lookup, Outer, summed_gradient
from geffect_fast.capture.masses import opposed_masses
from geffect_fast.capture.segments import Offsets
from geffect_fast.errors import InputError
from geffect_fast.measure import memory
from geffect_fast.measure.profiler import Profiler

FORGET, RETAIN = samples([7, 3, 5], 1, 2), samples([6, 4], 2, 2)
OBJECTIVES = ["ga", "ga - 1.5*wga(alpha=1)", "0.5*ga + 2*gd"]
"""One elementary objective, a sum over the same rows, and a sum over two data sets."""
FINE = ("parameter", "sample", "position")


def measured(model, resolve=FINE, objectives=OBJECTIVES, forget=FORGET, **settings):
    profiler = Profiler.of(
        model,
        None,
        forget=forget,
        retain=RETAIN,
        objectives=objectives,
        resolve=resolve,
        **{"token_budget": 12} | settings,
    )
    return profiler.measure(conflicts=True)


@contextlib.contextmanager
def weights_of_places(model, n):
    """Have each module compute place `t` of its output by its own copies of parameters.

    Yields the copies, n of every parameter by its name; a tied one has the same in all modules.
    """
    copies = {
        name: [p.detach().clone().requires_grad_() for _ in range(n)]
        for name, p in model.named_parameters()
    }
    names = {id(p): name for name, p in model.named_parameters()}

    def by_place(module, plain):
        own = {local: names[id(p)] for local, p in module._parameters.items() if p is not None}
        kept = dict(module._parameters)

        def forward(*args, **kwargs):
            outputs = []
            for t in range(n):
                module._parameters.update({local: copies[name][t] for local, name in own.items()})
                outputs.append(plain(*args, **kwargs))
            module._parameters.update(kept)

            def joined(*of):
                places = [y.select(-2, t) for t, y in enumerate(of)]
                return torch.stack(places, -2) if of[0].is_floating_point() else of[0]

            return tree_map(joined, *outputs)

        return forward

    owners = [m for m in model.modules() if any(p is not None for p in m._parameters.values())]
    for module in owners:
        module.forward = by_place(module, module.forward)
    try:
        yield copies
    finally:
        for module in owners:
            del module.forward


def share_of(objective, model, row, retained):
    """The row's share of an objective's value; None where the objective does not read the row."""
    logp = token_logprobs(model, row)
    if retained:
        return 2 * mean_over("token", RETAIN, -logp) if "gd" in objective else None
    ga = mean_over("token", FORGET, logp)
    if "wga" in objective:
        return ga - 1.5 * mean_over("token", FORGET, logp.exp().detach() * logp)
    return 2.5 * ga if "gd" in objective else ga


def brute_force(model, retain):
    """Sizes, and sizes of opposing parts, `(2, objective, parameter, sample, position)`."""
    rows = [(row, False) for row in FORGET] + [(row, True) for row in RETAIN]
    longest = max(len(row["input_ids"]) for row, _ in rows)
    found = np.zeros((2, len(OBJECTIVES), len(retain), len(rows), longest))
    for i, (row, retained) in enumerate(rows):
        n = len(row["input_ids"])
        with weights_of_places(model, n) as copies:
            for k, objective in enumerate(OBJECTIVES):
                share = share_of(objective, model, row, retained)
                if share is None:
                    continue
                leaves = [p for of in copies.values() for p in of]
                grads = torch.autograd.grad(share, leaves, allow_unused=True)
                for at, grad in enumerate(grads):
                    if grad is not None:
                        p, t = divmod(at, n)
                        against = grad.sign() * list(retain.values())[p].sign() < 0
                        sizes = grad.abs().double()
                        found[:, k, p, i, t] = float(sizes.sum()), float(sizes[against].sum())
    return found


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((name, torch.float64) for name in ("llama", "llama_tied", "gpt2", "mixtral")),
        ("llama_tied", torch.float32),
    ],
    ids=str,
)
def test_each_place_is_that_of_plain_autograd(architecture, dtype):
    wide, tolerance = contextlib.nullcontext(), 1e-5
    if dtype == torch.float64:
        wide, tolerance = fp64_throughout(), 1e-10
    with wide:
        model = build(architecture, dtype)
        found = measured(model)
        result = found.dataset
        # Signs of pure rounding (the gradients of biases of keys) are those of the profile.
        retain = {name: of[1] for name, of in found.directions.items()}
        mass, opposing = brute_force(model, retain)
    assert result.place_mass.dims == result.place_conflict_share.dims == ("objective", *FINE)
    scale = mass.max((0, 2, 3), keepdims=True)  # for each parameter
    assert (scale > 0).all()
    share = result.place_conflict_share.values
    np.testing.assert_allclose(result.place_mass / scale, mass / scale, rtol=0, atol=tolerance)
    measured_opposing = np.nan_to_num(share) * result.place_mass.values
    np.testing.assert_allclose(measured_opposing / scale, opposing / scale, rtol=0, atol=tolerance)
    assert ((share >= 0) & (share <= 1) | np.isnan(share)).all()
    assert (np.isnan(share) == (result.place_mass.values == 0)).all()
    assert np.isnan(share[0][:, len(FORGET) :]).all()  # ga reads no retain row
    assert not np.isnan(share[2][:, len(FORGET) :]).all()
    assert float(np.nanstd(share)) > 0.05


def test_coarser_ones_are_sums():
    with fp64_throughout():
        model = build("llama_tied", torch.float64)
        fine = measured(model).dataset
        opposing = (fine.place_conflict_share * fine.place_mass).fillna(0)
        for resolve, gone in [
            (("group", "sample", "position"), []),
            (("sample", "position"), ["parameter"]),
            (("position",), ["parameter", "sample"]),
        ]:
            result = measured(model, resolve, token_budget=40).dataset
            pairs = [(result.place_mass, fine.place_mass)]
            pairs += [(result.place_conflict_share * result.place_mass, opposing)]
            for found, expected in pairs:
                if gone:
                    expected = expected.sum(gone)
                else:
                    expected = expected.groupby("group").sum().sel(group=found.group)
                    expected = expected.transpose(*found.dims)
                np.testing.assert_allclose(found.fillna(0), expected, rtol=1e-9, atol=1e-15)


def test_places_cancel_in_the_whole_gradient_and_nothing_else_changes():
    model = build("llama")
    result = measured(model, ("group", "sample", "position")).dataset
    places = result.place_mass.sum(["sample", "position"])
    assert (places > 1.05 * result.gradient_mass).any() and (
        places >= result.gradient_mass * (1 - 1e-6)
    ).all()
    plain = gf.profile(
        model,
        None,
        forget=FORGET,
        retain=RETAIN,
        objectives=OBJECTIVES,
        resolve=("group", "sample", "position"),
        token_budget=12,
    )
    added = {"place_mass", "place_conflict_share"}
    added |= {"gradient_mass", "conflict_share", "fisher_trace"}
    assert set(result.data_vars) - set(plain.data_vars) == added
    for name in plain.data_vars:
        np.testing.assert_array_equal(plain[name], result[name])


@pytest.mark.parametrize("resolve", [("sample",), ("sample", "token")])
def test_there_are_none_without_positions(resolve):
    result = measured(build("llama"), resolve).dataset
    assert "conflict_share" in result and "place_mass" not in result


def test_rows_of_several_sequences_and_sums_that_read_one_row_twice(monkeypatch):
    others = samples([4, 6, 3], 3, 2)
    forget = [row | {"alternative": [o]} for row, o in zip(FORGET, others, strict=True)]
    model, wanted = build("llama"), ("sample", "position")
    settings = {"forget": forget, "reference_model": build("llama", seed=1), "token_budget": 30}
    apart = measured(model, wanted, ["dpo", "po", "ga + po", "ga"], **settings).dataset
    mass = apart.place_mass.sel(objective="ga + po")
    parts = apart.place_mass.sel(objective=["ga", "po"])
    np.testing.assert_allclose(mass, parts.sum("objective"), rtol=1e-5)  # for every other place
    read = apart.place_mass.isel(sample=slice(len(FORGET))) > 0
    for sequence, objectives in enumerate((["dpo", "ga + po", "ga"], ["dpo", "po", "ga + po"])):
        here = read.where(apart.sequence == sequence, False).any("position").all("sample")
        assert here.objective[here].values.tolist() == objectives
    with pytest.raises(
        InputError, match=r"objective 'ga \+ dpo.*row's answer in different.*as obj"
    ):
        measured(model, wanted, ["ga", "ga + dpo"], **settings)
    monkeypatch.setattr(memory, "free_memory", lambda _device: 2**13)
    with pytest.raises(InputError, match=r"conflicts: by position they take .* are free"):
        memory.check_place_memory((1, 3, 1, 20, 20))


# ---- more than one product at a place ----


def outer(n_rows, cu, d_in, d_out, transposed=False):
    a, g = torch.randn(n_rows, d_in).double(), torch.randn(n_rows, d_out).double()
    return Outer(a, g, Offsets(cu), transposed)


def lookup(ids, cu, n_entries, d):
    return Lookup(torch.tensor(ids), torch.randn(len(ids), d).double(), Offsets(cu), n_entries)


FACTORS = {
    "tied": lambda: [outer(2, (0, 1, 1, 2), 4, 7), lookup([5, 0, 5], (0, 1, 2, 3), 7, 4)],
    "tied, the other way": lambda: [
        lookup([6, 3], (0, 0, 1, 2), 7, 4),
        outer(3, (0, 1, 2, 3), 7, 4, True),
    ],
    "called twice": lambda: [outer(3, (0, 1, 2, 3), 4, 7), outer(2, (0, 0, 1, 2), 4, 7)],
    "several rows": lambda: [outer(5, (0, 2, 2, 5), 4, 7)],
    "looked up twice": lambda: [lookup([1, 1, 2, 6], (0, 2, 3, 4), 7, 4)],
    "two tables in one": lambda: [lookup([1, 2, 6], (0, 1, 2, 3), 7, 4) for _ in range(2)],
    "tied, called twice": lambda: [
        *(outer(3, (0, 1, 2, 3), 4, 7) for _ in range(2)),
        lookup([5, 0, 5], (0, 1, 2, 3), 7, 4),
    ],
}


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", FACTORS)
def test_sums_of_products_are_those_of_the_gradient_itself(kind, zeros):
    torch.manual_seed(3)
    factors, signs = FACTORS[kind](), torch.randn(7, 4).double().sign()
    if zeros:
        signs *= torch.rand(7, 4) < 0.6
    grads = [summed_gradient(factors, i, signs.shape) for i in range(3)]
    expected = [[g.abs().sum(), g.abs()[g * signs < 0].sum()] for g in grads]
    found = opposed_masses(factors, signs, zeros)
    torch.testing.assert_close(found, torch.tensor(expected).double().T, rtol=1e-12, atol=1e-12)

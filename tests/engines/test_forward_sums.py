"""Effects of the forward engine add up over axes and passes, to those of the reverse engine."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import xarray as xr
from engines.forward_cases import FORGET, OBJECTIVES, RETAIN, close, run
from models import build, fp64_throughout

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.engines.forward import parameter_passes_for
from geffect_fast.measure import profiler as profiling
from geffect_fast.storage.run_folder import open_run


@pytest.mark.parametrize("reduction", ["token", "sample", "sum"])
def test_equals_the_reverse_engine_under_every_reduction(exact, reduction):
    model, other, _, result = exact
    settings = {"resolve": ["sample"], "reduction": reduction}
    with fp64_throughout():
        expected = run(model, other, engine="reverse", norms=False, **settings)
        found = run(model, other, **settings)
    for k in range(len(OBJECTIVES)):
        close(found.g_effect[k], expected.g_effect[k])
    for name in ("loss", "risk_value"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)
    assert {"grad_norm", "cosine", "parameter_cosine"}.isdisjoint(found)
    if reduction == "token":
        np.testing.assert_allclose(found.g_effect, result.g_effect.sum("token"), atol=1e-14)


def test_norms_of_the_risks_are_there(exact):
    _, _, risks, result = exact
    for m, risk in enumerate(risks):
        norm = float(sum(v.square().sum() for v in risk).sqrt())
        assert float(result.risk_grad_norm[m]) == pytest.approx(norm, rel=1e-9)


BLOCKS = {"ends": [0, 2], "inside": "1"}


@pytest.mark.parametrize("groups", [None, BLOCKS, {"first": 0}], ids=str)
def test_groups_and_tokens_add_up(exact, groups):
    """Every coarser view is a sum of the finer one, and groups are those of the reverse engine."""
    model, other, _, result = exact
    objectives = ["dpo(beta=0.5)", "rmu(layer=1, c=3)", "npo(beta=0.5) + 2*kl"]
    result = result.sel(objective=objectives)
    with fp64_throughout():
        fine = run(model, other, objectives, ["group", "sample", "token"], groups=groups)
        by_group = run(
            model,
            other,
            objectives,
            ["group", "sample"],
            groups=groups,
            engine="reverse",
            norms=False,
        )
        if groups is None:
            tokens = run(model, other, objectives, ["token"])
            close(tokens.g_effect, result.g_effect.sum("sample"))
            coarse = run(model, other, objectives, ["group"])
            close(coarse.g_effect, fine.g_effect.sum(["sample", "token"]))
    assert fine.g_effect.dims == ("objective", "risk", "group", "sample", "token")
    between = {"ends": ["ends", "inside"], "first": ["first", "other_blocks"]}
    names = ["shallow", "middle", "deep"] if groups is None else between[next(iter(groups))]
    names = ["embedding", *names, "final_norm"]
    assert list(fine.group.values) == names == list(by_group.group.values)
    for k in range(len(objectives)):
        close(fine.g_effect[k].sum("token"), by_group.g_effect[k])
        close(fine.g_effect[k].sum("group"), result.g_effect[k])


def test_three_risks_are_three_directions(exact):
    model, other, _, result = exact
    objectives = ["wga(alpha=1.5)", "dpo(beta=0.5)"]
    with fp64_throughout():
        found = run(model, other, objectives, probes={"general": RETAIN[:1]})
        alone = gf.profile(
            model, None, forget=FORGET, retain=RETAIN[:1], objectives=objectives,
            reference_model=other, resolve=["sample", "token"], engine="forward",
        )  # fmt: skip
    n = len(FORGET)
    close(found.g_effect[:, :2], result.g_effect.sel(objective=objectives)[:, :, :n])
    close(found.g_effect[:, 2], alone.g_effect[:, 1])


def test_objectives_do_not_meet(exact):
    """An objective has the same effects alone and beside others."""
    model, other, _, result = exact
    with fp64_throughout():
        for name in ("npo(beta=0.5) + 2*kl", "ceu(skip=0)", "rmu(layer=1, c=3)"):
            found = run(model, other, [name]).g_effect[0]
            beside = result.g_effect.sel(objective=name)
            close(found, beside[:, : found.shape[1], : found.shape[2]], 1e-12)


def test_twice_the_same_is_bitwise_the_same():
    model = build("gemma2")
    first, again = (run(model, objectives=["dpo", "ga + rr(layer=1)"]) for _ in range(2))
    assert np.array_equal(first.g_effect.values, again.g_effect.values)


# ---- in several passes, and to a file ----


def passes_of(monkeypatch, memory_bytes):
    """The passes into which profiles are cut from now on, with `memory_bytes` of free memory."""
    made = []

    def cut(*args, **kwargs):
        made.append(parameter_passes_for(*args, **kwargs, memory_bytes=memory_bytes))
        return made[-1]

    monkeypatch.setattr(profiling, "parameter_passes_for", cut)
    return made


@pytest.mark.parametrize(
    ("split", "resolve"),
    [
        ("nothing", ("sample", "token")),
        ("directions", ("sample", "token")),
        ("parameters", ("sample", "token")),
        ("parameters", ("group", "sample")),
    ],
    ids=str,
)
def test_passes_by_memory_change_nothing(exact, split, resolve, monkeypatch):
    model, other, *_ = exact
    size = sum(8 * p.numel() for p in model.parameters())
    memory = {"nothing": 2 * size, "directions": size, "parameters": size // 2}[split]
    objectives = ["ga + kl", "rmu(layer=1)"]
    with fp64_throughout():
        whole = run(model, other, objectives, resolve=resolve)
        made = passes_of(monkeypatch, memory)
        found = run(model, other, objectives, resolve=resolve)
    passes = made[0]
    if resolve == ("sample", "token"):
        assert len(passes) == {"nothing": 1, "directions": 2}.get(split, len(passes))
        assert split != "parameters" or len(passes) > 4
    for k in range(2):
        close(found.g_effect[k], whole.g_effect[k], 1e-12)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-14)


@pytest.mark.parametrize("n_directions", [1, 2, 3])
@pytest.mark.parametrize("memory", [None, 10**9, 20_000, 5_000, 1])
def test_passes_move_every_parameter_once_for_every_direction(memory, n_directions):
    plan = Plan.of(build("llama"))
    names = list(plan.parameters)
    for columns in ([0] * len(names), [i % 3 for i in range(len(names))]):
        parts = parameter_passes_for(plan, columns, n_directions, memory)
        moving = [(name, risk) for part in parts for name in part.names for risk in part.risks]
        assert sorted(moving) == sorted((name, m) for name in names for m in range(n_directions))
        for part in parts:
            assert {columns[names.index(name)] for name in part.names} == {part.column}
            used = len(part.risks) * sum(4 * plan.parameters[name].numel() for name in part.names)
            least = len(part.names) == 1 and len(part.risks) == 1
            assert least or used <= (memory or 2**62)
        if memory == 10**9:
            assert len(parts) == max(columns) + 1


def test_progress_counts_every_pass(exact, monkeypatch):
    model, other, *_ = exact
    told = []

    @contextlib.contextmanager
    def bar(_show, _what, total):
        done = []
        yield lambda advance: done.append(advance)
        told.append((sum(done), total))

    monkeypatch.setattr(profiling, "progress_bar", bar)
    made = passes_of(monkeypatch, 20_000)
    run(model, other, ["ga"])
    assert all(done == total for done, total in told)
    tokens = sum(len(row["input_ids"]) for row in FORGET)
    assert [total for _, total in told][1] == len(made[0]) * tokens > tokens


def test_streamed_equals_in_memory(tmp_path):
    model, objectives = build("gpt2"), ["dpo", "ga + rr(layer=1)"]
    resolve = ["group", "sample", "token"]
    expected = run(model, None, objectives, resolve)
    with run(model, None, objectives, resolve, out=tmp_path / "effects.nc") as found:
        xr.testing.assert_equal(found.load()["g_effect"], expected["g_effect"])
        xr.testing.assert_allclose(found, expected, rtol=1e-12)
        assert found.attrs.keys() == expected.attrs.keys()
    np.testing.assert_array_equal(open_run(tmp_path / "effects.nc").g_effect, expected.g_effect)

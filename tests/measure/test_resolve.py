"""Effects by group and by position: against brute force, and as sums of finer results."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from engines.forward_cases import close
from engines.small_models import WithoutPositions, ready
from models import build, fp64_throughout, samples
from reference import gradients, mean_over, token_logprobs
from torch import nn

import geffect_fast as gf
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.measure import memory
from geffect_fast.measure import profiler as profiling
from geffect_fast.results.groups import GROUPS, groups_of
from geffect_fast.storage.run_folder import open_run

FORGET, RETAIN = samples([2, 11, 5, 19], 1, 3), samples([9, 17, 12], 2, 3)
OBJECTIVES = ["ga", "npo(beta=0.1) + 0.5*kl", "dpo(beta=0.2)"]


def rows_with_alternatives():
    others = [[a] for a in samples([6, 9, 13, 4], 3, 3)]
    others[2] += samples([6, 5], 4, 3)
    return [row | {"alternative": other} for row, other in zip(FORGET, others, strict=True)]


def run(model, resolve, objectives=OBJECTIVES, forget=None, **kwargs):
    forget = rows_with_alternatives() if forget is None else forget
    other = build(kwargs.pop("other")) if "other" in kwargs else None
    return gf.profile(
        model,
        None,
        forget=forget,
        retain=RETAIN,
        objectives=objectives,
        resolve=resolve,
        reference_model=other,
        **{"token_budget": 60} | kwargs,
    )


@pytest.mark.parametrize("architecture", ["llama_tied", "gpt2", "gemma2", "mixtral"])
def test_positions_and_groups_add_up(architecture):
    """Every coarser view is a sum of the finer one, also for samples of several sequences."""
    with fp64_throughout():
        model = build(architecture, torch.float64)
        fine = run(model, ("parameter", "sample", "position"))
        by_sample = run(model, ("parameter", "sample"))
        assert fine.attrs["layout"] == "packed"
        assert fine.g_effect.dims == ("objective", "risk", "parameter", "sample", "position")
        close(fine.g_effect.sum("position"), by_sample.g_effect)
        groups = run(model, ("group", "sample", "position")).g_effect
        close(groups, fine.g_effect.groupby("group").sum().sel(group=groups.group))
        close(run(model, ("position",)).g_effect, fine.g_effect.sum(["parameter", "sample"]))
        close(run(model, ("group",)).g_effect, groups.sum(["sample", "position"]))
    longest = max(
        len(row["input_ids"]) + sum(len(a["input_ids"]) for a in row["alternative"])
        for row in rows_with_alternatives()
    )
    assert fine.sizes["position"] == longest
    assert not fine.g_effect.where(fine.token_id < 0, 0).any()


def test_coordinates_of_positions():
    fine = run(build("llama"), ("sample", "position"))
    for row, given in enumerate(rows_with_alternatives()):
        sequences = [given, *given["alternative"]]
        ids = [token for s in sequences for token in s["input_ids"]]
        numbers = [q for q, s in enumerate(sequences) for _ in s["input_ids"]]
        one = fine.isel(sample=row)
        assert one.token_id.values[: len(ids)].tolist() == ids
        assert (one.token_id.values[len(ids) :] == -1).all()
        assert one.sequence.values[: len(ids)].tolist() == numbers
    assert fine.token_id.values[len(FORGET), :9].tolist() == RETAIN[0]["input_ids"]
    assert "token_text" not in fine.coords


def brute_force(model, layer: nn.Module, row, direction) -> np.ndarray:
    """`g_t^T V a_t` of a linear layer for one sample, from its own input and output gradient."""
    kept = {}

    def keep(_module, args, output):
        kept["a"] = args[0]
        output.retain_grad()
        kept["y"] = output

    handle = layer.register_forward_hook(keep)
    loss = mean_over("token", FORGET, token_logprobs(model, row))
    loss.backward()
    handle.remove()
    a, g = kept["a"][0].double(), kept["y"].grad[0].double()
    return ((a @ direction.T) * g).sum(-1).detach().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_position_is_where_the_layer_is_used(dtype):
    wide = fp64_throughout() if dtype == torch.float64 else contextlib.nullcontext()
    with wide:
        model = build("llama", dtype)
        name = "model.layers.1.mlp.up_proj"
        found = run(model, ("parameter", "sample", "position"), ["ga"], FORGET)
        risk = sum(mean_over("token", RETAIN, -token_logprobs(model, row)) for row in RETAIN)
        at = [n for n, _ in model.named_parameters()].index(f"{name}.weight")
        direction = gradients(risk, model)[at]
        for i, row in enumerate(FORGET):
            expected = brute_force(model, model.get_submodule(name), row, direction)
            one = found.g_effect.sel(objective="ga", risk="retain", parameter=f"{name}.weight")
            one = one.isel(sample=i).values[: len(expected)]
            close(one, expected, 1e-5 if dtype == torch.float32 else 1e-10)


def test_an_embedding_is_used_where_its_token_stands():
    """Row `id` of the table times the directions at that row; no other position sees the row."""
    with fp64_throughout():
        model = build("llama", torch.float64)
        found = run(model, ("parameter", "sample", "position"), ["ga"], FORGET)
        embedding = found.g_effect.sel(parameter="model.embed_tokens.weight")
        risk = sum(mean_over("token", RETAIN, -token_logprobs(model, row)) for row in RETAIN)
        silent = gradients(risk, model)[0].abs().sum(1) == 0
        absent = silent.numpy()[np.clip(found.token_id.values[:4], 0, None)]
        assert absent.any() and not absent.all()
        assert not embedding.sel(risk="retain").values[:, :4][..., absent].any()


@pytest.mark.parametrize(
    ("make", "layout"),
    [(ARCHITECTURES["gpt2"], "packed"), (WithoutPositions, "equal_length")],
    ids=["gpt2", "without_positions"],
)
def test_every_layout_gives_the_same_positions(make, layout):
    with fp64_throughout():
        model = ready(make)
        expected = ready(ARCHITECTURES["gpt2"])
        wanted = ("parameter", "sample", "position")
        found, packed = (run(each, wanted, conflicts=True) for each in (model, expected))
        close(found.g_effect.values, packed.g_effect.values)
        close(found.place_mass.values, packed.place_mass.values)
        assert packed.attrs["layout"] == "packed"
        assert found.attrs["layout"] == layout


def test_norms_by_group():
    result = run(build("phi"), ("group", "sample"), ["ga", "gd"])
    by_parameter = run(build("phi"), ("parameter", "sample"), ["ga", "gd"])
    names, members = groups_of(list(by_parameter.parameter.values))
    assert names == list(result.group.values) == [g for g in GROUPS if g in names]
    for g in range(len(names)):
        at = [p for p, group in enumerate(members) if group == g]
        squared = (by_parameter.parameter_grad_norm[at] ** 2).sum("parameter")
        np.testing.assert_allclose(result.group_grad_norm[g], squared**0.5, rtol=1e-6)
    product = result.group_grad_norm * result.group_risk_grad_norm
    np.testing.assert_allclose(
        (result.group_cosine * product).transpose("objective", "risk", "group"),
        result.g_effect.sum("sample").transpose("objective", "risk", "group"),
        rtol=1e-3,
        atol=1e-6 * float(product.max()),
    )


# ---- streamed to a file ----


def nearly(found, expected):
    if found.dtype.kind != "f":
        return np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "resolve", [("parameter", "sample", "position"), ("sample", "position")], ids=str
)
def test_streamed_equals_in_memory(tmp_path, resolve):
    model = build("llama")
    expected = run(model, resolve, token_budget=40)
    found = run(model, resolve, token_budget=40, out=tmp_path / "effects.nc")
    with found:
        assert found.g_effect.dims == expected.g_effect.dims
        for name in expected.variables:
            # Sums over rows are added up in another order.
            exact = name in ("g_effect", *expected.coords)
            (np.testing.assert_array_equal if exact else nearly)(
                found[name].values, expected[name].values
            )
        assert set(found.coords) == set(expected.coords)
        assert found.attrs.keys() == expected.attrs.keys()
    np.testing.assert_array_equal(open_run(tmp_path / "effects.nc").g_effect, expected.g_effect)
    assert [p.name for p in tmp_path.iterdir()] == ["effects.nc"]


def test_a_streamed_result_never_is_in_memory(tmp_path, monkeypatch):
    """No array of the result's size is made, and one sample is written at a time."""
    sizes, made = [], []
    add, zeros = profiling.EffectFile.__setitem__, np.zeros

    def watch(self, index, values):
        sizes.append(values.size)
        add(self, index, values)

    monkeypatch.setattr(profiling.EffectFile, "__setitem__", watch)
    monkeypatch.setattr(np, "zeros", lambda *a, **k: made.append(zeros(*a, **k)) or made[-1])
    with run(build("llama"), ("parameter", "sample", "position"), out=tmp_path / "e.nc") as found:
        assert max(sizes) <= found.g_effect.size / found.sizes["sample"]
        assert len(sizes) > found.sizes["sample"]
        assert max(array.size for array in made) < found.g_effect.size / 2


def test_a_run_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    file = tmp_path / "effects.nc"
    with monkeypatch.context() as patch:
        patch.setattr(profiling.EffectFile, "__setitem__", fail)
        with pytest.raises(InputError, match=r"effects\.nc cannot be written: .*No space left"):
            run(build("llama"), ("sample", "position"), out=file)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("geffect_fast.measure.effects.check_effects", fail)
        with pytest.raises(InputError):
            run(build("llama"), ("sample", "position"), out=file)
    assert list(tmp_path.iterdir()) == []


# ---- refused ----


@pytest.mark.parametrize(
    ("resolve", "words"),
    [
        (("parameter", "group"), "give 'parameter' or 'group'"),
        (("token", "position"), "are two profiles"),
        (("layer",), "unknown axis 'layer'; choose from parameter, group, sample, position"),
    ],
)
def test_axes_that_are_refused(resolve, words):
    with pytest.raises(InputError, match=words):
        run(build("llama"), resolve)


@pytest.mark.parametrize(
    ("resolve", "out", "words"),
    [
        (("parameter", "sample"), "e.nc", "goes with resolve by 'sample' and 'position'"),
        (("sample", "position"), "none/e.nc", "does not exist; make it first"),
        (("sample", "position"), "there.nc", "exists; choose another name"),
    ],
)
def test_files_that_are_refused(tmp_path, resolve, out, words):
    (tmp_path / "there.nc").write_text("mine")
    with pytest.raises(InputError, match=words):
        run(build("llama"), resolve, out=tmp_path / out)
    assert (tmp_path / "there.nc").read_text() == "mine"


def test_a_result_larger_than_memory_is_refused(monkeypatch):
    wanted = ("parameter", "sample", "position")
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1_000_000)
    with pytest.raises(InputError, match="resolve by 'group' in place of 'parameter'"):
        run(build("llama"), wanted, ["ga"], samples([900] * 9, 1))


def test_a_module_whose_rows_are_no_positions_is_named():
    class Pooled(nn.Module):
        """A layer that sees the mean of a sequence."""

        def __init__(self):
            super().__init__()
            self.inner = ARCHITECTURES["gpt2"]()
            self.pool = nn.Linear(16, 61)

        def forward(self, input_ids):
            hidden = self.inner.transformer(input_ids=input_ids).last_hidden_state
            return self.inner.lm_head(hidden) + self.pool(hidden.mean(1))[:, None]

    model = ready(Pooled)
    assert run(model, ("sample",), ["ga"], FORGET).attrs["layout"] == "equal_length"
    with pytest.raises(UnsupportedModelError, match=r"module 'pool'.*apart by position"):
        run(model, ("position",), ["ga"], FORGET)

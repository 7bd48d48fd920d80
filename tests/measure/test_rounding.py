"""The precision that a result of 16 bits states, against plain autograd in 16 bits and in fp32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from models import build, samples
from reference import effects_of_each

import geffect_fast as gf
from geffect_fast.measure import rounding
from geffect_fast.measure.profiler import Profiler
from geffect_fast.measure.rounding import precision_error_of, two_rows
from geffect_fast.steps.probe import Probe, run_identity
from geffect_fast.storage.results_file import write_dataset
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.step_store import StepStore

FORGET, RETAIN = samples([9, 14, 6, 11, 17, 8, 12], 1), samples([10, 7, 15, 9], 2)
DATA = {"forget": FORGET, "retain": RETAIN}
OBJECTIVES = {
    "ga": [(1.0, "ga", {})],
    "npo(beta=0.5)": [(1.0, "npo", {"beta": 0.5})],
    "gd(alpha=2)": [(1.0, "ga", {}), (2.0, "nll", {})],
}
STATED = {"precision_error", "precision_samples"}


def stated(result):
    """The attributes in which a result states its precision."""
    return {key: value for key, value in result.attrs.items() if key.startswith("precision")}


def profile(model, **more):
    given = {"objectives": ["ga"], "resolve": ("sample",), "engine": "reverse", "norms": False}
    return gf.profile(model, None, **DATA, **(given | more))


@pytest.mark.parametrize(
    ("architecture", "engine"), [("llama", "reverse"), ("llama", "forward"), ("mamba", "reverse")]
)
def test_the_figure_is_that_of_plain_autograd(architecture, engine, monkeypatch):
    """The fp32 side of the figure is plain autograd's, and the figure is of the same size.

    The bf16 side rounds in other places than plain autograd: plain autograd's figure is between a
    third of ours and five times ours, as duals round less. Mamba uses parameters outside of the
    modules that hold them, which only a first run of the model shows.
    """
    model = build(architecture, torch.bfloat16)
    reference = build(architecture, seed=5)
    passes = []
    find_effects = rounding.find_effects

    def kept(*args, **kwargs):
        found = find_effects(*args, **kwargs)
        passes.append(next(a for a in args if isinstance(a, np.ndarray)).sum((2, 4)))
        return found

    monkeypatch.setattr(rounding, "find_effects", kept)
    given = {"objectives": list(OBJECTIVES), "resolve": ("sample",), "engine": engine}
    profiler = Profiler.of(model, None, **DATA, reference_model=reference, **given, norms=False)
    measured = profiler.measure()
    risks = [
        [measured.directions[name][m].double() for name, _ in model.named_parameters()]
        for m in range(2)
    ]

    def plain(model):
        found = effects_of_each(
            model, reference, OBJECTIVES.values(), FORGET, RETAIN, None, risks=risks
        )
        return torch.stack(found).sum(2).numpy()[..., [0, 3, 7, 9]]

    (exact,) = passes
    in_bf16, in_fp32 = plain(model), plain(copy.deepcopy(model).float())
    scale = np.linalg.norm(in_fp32, axis=2, keepdims=True)
    np.testing.assert_allclose(exact / scale, in_fp32 / scale, atol=2e-5)
    rows = measured.dataset.g_effect.values
    found = rows[..., [0, 3, 7, 9]]

    def figure_of(off):
        split = [(off[..., :2], rows[..., :7]), (off[..., 2:], rows[..., 7:])]
        off, size = (sum((x[i] ** 2).mean(-1) for x in split) for i in range(2))
        return 3 * np.sqrt(off / size).max()

    figure = measured.dataset.attrs["precision_error"]
    assert figure == pytest.approx(figure_of(found - exact), rel=1e-9)
    # By how much plain autograd rounds in bf16 depends on the processor.
    plainly = figure_of(in_bf16 - in_fp32)
    assert plainly / 20 <= figure <= 3 * plainly
    assert measured.dataset.attrs["precision_samples"] == [0, 3]


@pytest.mark.parametrize("engine", ["reverse", "forward"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_whole_profile_is_as_far_from_fp32_as_the_figure_says(architecture, engine):
    """The profile and the reference are of all rows, with the risks' gradients in fp32 too.

    The figure is an estimate from two rows, and meant to be large rather than small.
    """
    for seed in range(2):
        model = build(architecture, torch.bfloat16, seed)
        objectives = ["ga", "wga(alpha=1)", "simnpo(beta=2.5)"]
        ours = profile(model, objectives=objectives, engine=engine)
        exact = profile(copy.deepcopy(model).float(), objectives=objectives, engine=engine)
        x, y = ours.g_effect.values, exact.g_effect.values
        off = float((np.linalg.norm(x - y, axis=2) / np.linalg.norm(y, axis=2)).max())
        assert off / 2 <= ours.attrs["precision_error"] <= 10 * off
        assert stated(exact) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_precisions_say_nothing(dtype):
    assert stated(profile(build("llama", dtype))) == {}


def test_fp16_rounds_less_than_bf16():
    model = build("llama")
    figures = [
        profile(copy.deepcopy(model).to(dtype)).attrs["precision_error"]
        for dtype in (torch.bfloat16, torch.float16)
    ]
    assert figures[1] < 0.5 * figures[0]


@pytest.mark.parametrize("axes", [("parameter", "sample"), ("group", "sample", "position")])
def test_the_figure_does_not_depend_on_other_axes(axes):
    model = build("llama", torch.bfloat16)
    found, expected = stated(profile(model, resolve=axes)), stated(profile(model))
    assert found.pop("precision_error") == pytest.approx(expected.pop("precision_error"), rel=1e-5)
    assert found == expected


@pytest.mark.parametrize("axes", [("parameter",), ("position",)])
def test_without_samples_the_two_rows_are_compared_with_themselves(axes):
    model = build("llama", torch.bfloat16)
    found = stated(profile(model, resolve=axes, norms=None))
    assert found.keys() == STATED and 0 < found["precision_error"] < 1


def test_a_result_in_a_file_has_it_too(tmp_path):
    axes = ("sample", "position")
    with profile(build("llama", torch.bfloat16), resolve=axes, out=tmp_path / "e.nc") as result:
        assert stated(result).keys() == STATED


def test_nothing_is_left_of_the_copy():
    model = build("llama", torch.bfloat16)
    before = {name: (p, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    first = stated(profile(model))
    for name, p in model.named_parameters():
        was, place, values = before[name]
        assert p is was and p.data_ptr() == place and torch.equal(p, values)
        assert p.requires_grad and p.grad is None
    assert stated(profile(model)) == first


def test_without_room_for_a_copy_the_result_says_so(monkeypatch):
    model = build("llama", torch.bfloat16)
    exact = profile(model)
    monkeypatch.setattr(rounding, "free_memory", lambda _: 1000)
    result = profile(model)
    (note,) = stated(result).values()
    assert note == ("not measured: the weights in float32 take 0.0 GiB and 0.0 GiB are free")
    np.testing.assert_array_equal(result.g_effect, exact.g_effect)


def test_a_model_that_has_no_fp32_says_so(monkeypatch):
    def refuse(_plan):
        raise RuntimeError("quantised weights\nhave no fp32")

    monkeypatch.setattr(rounding, "_in_fp32", refuse)
    result = profile(build("llama", torch.bfloat16))
    assert stated(result) == {"precision_note": "not measured: RuntimeError: quantised weights"}


def test_attributes_are_kept_in_files(tmp_path):
    result = profile(build("llama", torch.bfloat16))
    write_dataset(result, tmp_path / "results.nc")
    assert stated(open_run(tmp_path / "results.nc")) == stated(result)


def test_of_several_steps_the_first_says_it():
    model = build("llama", torch.bfloat16)
    profiler = Profiler.of(model, None, **DATA, objectives=["ga"], resolve=("sample",))
    probe = Probe(profiler, StepStore(None, run_identity(profiler)))
    first = stated(probe.measure_at(0))
    assert first.keys() == STATED
    assert stated(probe.measure_at(1)) == {}
    assert stated(probe.store.combined()) == first


def test_rows_are_the_first_and_the_middle():
    assert [two_rows(n) for n in (1, 2, 3, 10)] == [[0], [0, 1], [0, 1], [0, 5]]


def test_a_figure_is_the_largest_and_leaves_out_what_has_no_effect():
    size = np.array([[4.0, 100.0], [1e-14, 9.0]])
    off = np.array([[4e-4, 0.09], [1.0, 9e-6]])  # 1 %, 3 %; 0.1 % is pure rounding
    assert precision_error_of(off, size) == pytest.approx(0.09)
    assert precision_error_of(np.zeros((1, 1)), np.zeros((1, 1))) == 0

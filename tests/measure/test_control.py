"""`gf.control` and `geffect-fast control`: mixtures, the search, methods at equal retention."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import tokenize_rows, write_jsonl
from geffect_fast.demo import Size, make_model, save, train_tokenizer
from geffect_fast.demo.authors import make_fictitious_authors
from geffect_fast.errors import GEffectError, InputError
from geffect_fast.measure.control import largest_share
from geffect_fast.measure.mixture import Mixture, mixed
from geffect_fast.measure.models import load_model

peft = pytest.importorskip("peft")

ROWS = make_fictitious_authors(2, seed=3)
FORGET, RETAIN = ROWS[:4], ROWS[4:9]
TAUS = (0.5, 0.8, 0.95, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{row['question']} {row['answer']}" for row in ROWS], 320)


def fitted(model, tokenizer, rows, steps, sign=1.0, lr=1e-2):
    given = [s.answer for s in tokenize_rows(rows, tokenizer, name="rows").samples]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        one = given[step % len(given)]
        loss = model(input_ids=one.input_ids[None], labels=one.labels[None]).loss
        (sign * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def original(tokenizer):
    """A model that knows the rows."""
    torch.manual_seed(1)
    model = make_model(tokenizer, Size(hidden=32, n_layers=2))
    return fitted(model, tokenizer, [*FORGET, *RETAIN], 300)


@pytest.fixture(scope="module")
def unlearned(original, tokenizer):
    """After ascent on the forget rows, which costs the others too."""
    return fitted(copy.deepcopy(original), tokenizer, FORGET, 12, sign=-1.0, lr=1e-2)


@pytest.fixture(scope="module")
def gentler(original, tokenizer):
    return fitted(copy.deepcopy(original), tokenizer, FORGET, 8, sign=-1.0, lr=6e-3)


def by_hand(original, unlearned, alpha):
    """A model of mixed weights, by the formula in fp64."""
    model = copy.deepcopy(original)
    one, other = dict(original.named_parameters()), dict(unlearned.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((1 - alpha) * one[name].double() + alpha * other[name].double())
    return model


def retention(model, tokenizer, metric="extraction_strength"):
    found = gf.evaluate(model, tokenizer, forget=FORGET, retain=RETAIN, metrics=metric)
    return float(found.value.sel(set="retain")[0])


# ---- the search ----

CURVES = {
    "straight": lambda a: 1 - a,
    "early fall": lambda a: math.exp(-30 * a),
    "late fall": lambda a: 1 - a**20,
    "steps": lambda a: math.floor(8 * (1 - a)) / 8 + 0.25,
    "nothing lost": lambda a: 1 - 1e-9 * a,
    "rises again": lambda a: 0.7 + 0.3 * math.cos(12 * a) - 0.1 * a,
}


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("tolerance", [0.05, 1e-3])
@pytest.mark.parametrize("name", CURVES)
def test_the_share_is_the_best_point_of_a_fine_grid(name, tolerance, tau):
    kept = CURVES[name]
    found = largest_share(kept, tau, 40, tolerance)
    fine = [k / 20_000 for k in range(20_001)]
    best = max(a for a in fine if kept(a) >= tau * kept(0))
    assert kept(found.alpha) >= tau * kept(0)
    assert best - tolerance <= found.alpha <= best + 1 / 20_000
    if found.alpha < 1:
        assert kept(found.lost) < tau * kept(0)
        assert found.lost - found.alpha <= tolerance
    else:
        assert math.isnan(found.lost)
    assert found.monotone == (name != "rises again")


def test_each_share_is_measured_once_and_no_more_than_needed():
    asked = []

    def kept(alpha):
        asked.append(alpha)
        return 1 - alpha

    largest_share(kept, 0.95, 10, 0.01)
    assert len(asked) == len(set(asked)) == 11 + math.ceil(math.log2(0.1 / 0.01))


# ---- mixtures ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_is_the_formula_in_fp32_or_wider(original, unlearned, dtype):
    one, other = (copy.deepcopy(m).to(dtype) for m in (original, unlearned))
    working = copy.deepcopy(one)
    mixture = Mixture(one, other, working, "u")
    ends = dict(one.named_parameters()), dict(other.named_parameters())
    for alpha in (0.5, 0.3, 0.9, 1.0, 0.0):
        for name, p in mixture.at(alpha).named_parameters():
            exact = (1 - alpha) * ends[0][name].double() + alpha * ends[1][name].double()
            wide = 1e-15 if dtype == torch.float64 else 3e-7
            step = torch.finfo(dtype).eps / 2 * exact.abs() if dtype.itemsize == 2 else 0
            away = (p.double() - exact).abs()
            size = torch.maximum(ends[0][name].abs(), ends[1][name].abs()).double()
            assert (
                p.dtype == dtype
                and (away <= step * 1.01 + wide * size + 1e-7 * (dtype == torch.float16)).all()
            )
    for alpha, end in zip((1.0, 0.0), (other, one), strict=True):
        at = dict(mixture.at(alpha).state_dict())
        for name, tensor in end.state_dict().items():
            assert torch.equal(at[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_weight_that_unlearning_left_alone_stays_as_it_is():
    weight = torch.randn(1000)
    assert torch.equal(mixed(weight, weight.clone(), 0.3), weight)


def test_tied_weights_and_buffers(original, unlearned):
    one, other = copy.deepcopy(original), copy.deepcopy(unlearned)
    for k, model in enumerate((one, other)):
        model.lm_head.weight = model.model.embed_tokens.weight
        model.register_buffer("shift", torch.tensor([1.0 + k, 3.0]))
        model.register_buffer("places", torch.arange(3))
    mixture = Mixture(one, other, copy.deepcopy(one), "u")
    at = mixture.at(0.25)
    assert at.lm_head.weight is at.model.embed_tokens.weight
    expected = torch.lerp(one.lm_head.weight, other.lm_head.weight, 0.25)
    assert torch.equal(at.lm_head.weight, expected)
    assert at.shift.tolist() == [1.25, 3.0] and at.places.tolist() == [0, 1, 2]
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    with pytest.raises(InputError, match="are one tensor in the original only"):
        Mixture(one, other, copy.deepcopy(one), "u")


def logits(model):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapter_on(base, seed=3, **settings):
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"]} | settings
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"rank_pattern": {"q_proj": 5}},
    ],
    ids=str,
)
def test_an_adapter_is_mixed_by_scaling_what_it_adds(original, settings):
    unlearned = adapter_on(original, **settings)
    mixture = Mixture(original, unlearned, original, "u")
    whole = merged(unlearned)
    assert torch.equal(logits(mixture.at(0.0)), logits(original))
    assert torch.equal(logits(mixture.at(1.0)), logits(unlearned))
    for alpha in (0.3, 0.8):
        expected = logits(by_hand(original, whole, alpha))
        torch.testing.assert_close(logits(mixture.at(alpha)), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_of_one_base(original, tmp_path):
    one = adapter_on(original, 3)
    other = adapter_on(original, 4, r=3, target_modules=["q_proj", "down_proj"])
    working = copy.deepcopy(one)
    mixture = Mixture(one, other, working, "u")
    assert torch.equal(logits(mixture.at(0.0)), logits(one))
    assert torch.equal(logits(mixture.at(1.0)), logits(other))
    expected = logits(by_hand(merged(one), merged(other), 0.4))
    torch.testing.assert_close(logits(mixture.at(0.4)), expected, rtol=1e-4, atol=1e-4)
    # Means of A and of B would be another model.
    mean = copy.deepcopy(one)
    third = adapter_on(original, 4)
    ends = dict(one.named_parameters()), dict(third.named_parameters())
    with torch.no_grad():
        for name, p in mean.named_parameters():
            p.copy_(0.6 * ends[0][name] + 0.4 * ends[1][name])
    right = logits(by_hand(merged(one), merged(third), 0.4))
    assert (logits(mean) - right).abs().max() > 0.01
    # Saved as one adapter, which adds the same.
    mixture.save(tmp_path / "sum")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path / "sum"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(mixture.at(1.0)), logits(other))


PAIRS = {
    "one scale each": ({"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 3}),
    "rank-stabilised": (
        {"r": 4, "use_rslora": True},
        {"r": 6, "lora_alpha": 3, "use_rslora": True},
    ),
    "the first rank-stabilised": ({"r": 4, "use_rslora": True}, {"r": 6}),
    "the second rank-stabilised": ({"r": 4}, {"r": 6, "use_rslora": True}),
    "the first on one layer": ({"layers_to_transform": [0]}, {"r": 3}),
    "the second on one layer": ({"r": 3}, {"layers_to_transform": [1]}),
    "ranks and scales by module": (
        {"r": 4, "rank_pattern": {"q_proj": 2}},
        {"r": 6, "alpha_pattern": {"down_proj": 9}},
    ),
    "other modules": ({"target_modules": ["v_proj"]}, {"target_modules": ["embed_tokens"]}),
    "another beginning": ({"init_lora_weights": "gaussian"}, {"lora_dropout": 0.1}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_adapters_are_saved_as_the_one_that_was_measured(original, tmp_path, name):
    one, other = (adapter_on(original, 3 + i, **PAIRS[name][i]) for i in (0, 1))
    mixture = Mixture(one, other, copy.deepcopy(one), "u")
    measured = logits(mixture.at(0.3))
    expected = logits(by_hand(merged(one), merged(other), 0.3))
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-4)
    mixture.save(tmp_path / "sum")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path / "sum")).eval()
    torch.testing.assert_close(logits(loaded), measured, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(mixture.at(0.3)), measured)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 4}], ids=str)
@pytest.mark.parametrize("name", ["default", "unlearned"])
def test_an_adapter_is_saved_as_it_was_measured(original, tmp_path, settings, name):
    unlearned = adapter_on(original, **settings)
    if name != "default":
        unlearned.save_pretrained(tmp_path / "given")
        unlearned = peft.PeftModel.from_pretrained(
            copy.deepcopy(original), str(tmp_path / "given"), adapter_name=name
        ).eval()
    mixture = Mixture(original, unlearned, copy.deepcopy(original), "u")
    measured = logits(mixture.at(0.3))
    mixture.save(tmp_path / "mixed")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), str(tmp_path / "mixed"))
    torch.testing.assert_close(logits(loaded.eval()), measured, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(mixture.at(0.3)), measured)


@pytest.mark.parametrize("pair", [False, True])
def test_what_was_saved_is_read_again_and_compared(original, tmp_path, monkeypatch, pair):
    """Also where peft writes a config that means another scale than that of the weights."""
    from geffect_fast.measure import mixture as module

    write = module._save_adapter

    def another_scale(model, folder, name):
        write(model, folder, name)
        file = folder / "adapter_config.json"
        said = json.loads(file.read_text())
        file.write_text(json.dumps(said | {"lora_alpha": said["lora_alpha"] * 2}))

    monkeypatch.setattr(module, "_save_adapter", another_scale)
    first = adapter_on(original) if pair else original
    mixture = Mixture(first, adapter_on(original, 4), copy.deepcopy(first), "u")
    mixture.at(0.5)
    with pytest.raises(InputError, match=r"adds something else to model\.layers\.0\.") as caught:
        mixture.save(tmp_path / "sum")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pair", [False, True])
def test_adapters_have_the_base_in_common_with_the_working_model(original, unlearned, pair):
    first = adapter_on(original) if pair else original
    working = copy.deepcopy(first)
    theirs = {t.data_ptr() for t in working.parameters()}
    if not pair:
        Mixture(original, unlearned, working, "u").at(1.0)  # which leaves that in it
    other = adapter_on(original, 4, modules_to_save=None if pair else ["lm_head"])
    model = Mixture(first, other, working, "u").at(1.0)
    own = {name for name, p in model.named_parameters() if p.data_ptr() not in theirs}
    assert own and all("lora_" in name or "modules_to_save" in name for name in own)
    assert torch.equal(logits(model), logits(other))
    assert torch.equal(logits(working), logits(first))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_dropout", 0.3),
        ("initializer_range", 0.5),
        ("hidden_dropout_prob", 0.1),
        ("resid_pdrop", 0.1),
        ("embedding_dropout", 0.2),
        ("layerdrop", 0.1),
        ("summary_first_dropout", 0.2),
        ("router_aux_loss_coef", 0.1),
        ("problem_type", "regression"),
    ],
)
def test_configs_that_differ_in_training_only_are_mixed(original, unlearned, field, value):
    other = copy.deepcopy(unlearned)
    setattr(other.config, field, value)
    Mixture(original, other, copy.deepcopy(original), "u")


def test_configs_inside_a_config_are_compared(original, unlearned):
    one, other = copy.deepcopy(original), copy.deepcopy(unlearned)
    for model, theta, rate in ((one, 1.0, 0.0), (other, 1.0, 0.1)):
        model.config.inner = {"theta": theta, "attention_dropout": rate}
    Mixture(one, other, copy.deepcopy(one), "u")
    other.config.inner = {"theta": 2.0}
    with pytest.raises(InputError, match="its config has inner"):
        Mixture(one, other, copy.deepcopy(one), "u")


def test_a_switch_of_the_name_of_a_rate_is_compared(original, unlearned):
    other = copy.deepcopy(unlearned)
    other.config.token_dropout = True  # ESM's scales embeddings in eval mode too
    with pytest.raises(InputError, match="token_dropout = True"):
        Mixture(original, other, copy.deepcopy(original), "u")


# ---- the whole ----


@pytest.fixture(scope="module")
def result(original, unlearned, gentler, tokenizer):
    return gf.control(
        original,
        {"ascent": unlearned, "gentler": gentler},
        tokenizer,
        retain=RETAIN,
        forget=FORGET,
        metric="probability",
        tau=0.8,
        tolerance=1 / 64,
        grid=8,
    )


def test_methods_are_measured_where_each_keeps_enough(
    result, original, unlearned, gentler, tokenizer
):
    own = retention(original, tokenizer, "probability")
    assert result.sizes["model"] == 2 and result["model"].values.tolist() == ["ascent", "gentler"]
    for name, model in (("ascent", unlearned), ("gentler", gentler)):
        of = result.sel(model=name)
        share, lost = float(of.alpha_chosen), float(of.alpha_lost)
        assert 0 < share < 1 and lost - share <= 1 / 64
        at = by_hand(original, model, share)
        kept = retention(at, tokenizer, "probability")
        assert float(of.retention.sel(alpha=share)) == pytest.approx(kept, rel=1e-4)
        assert kept >= 0.8 * own * (1 - 1e-4)
        beyond = retention(by_hand(original, model, lost), tokenizer, "probability")
        assert beyond < 0.8 * own * (1 + 1e-4)
        expected = gf.evaluate(at, tokenizer, forget=FORGET, retain=RETAIN)
        np.testing.assert_allclose(of.value, expected.value, rtol=1e-3)
        np.testing.assert_allclose(of.value_low, expected.value_low, rtol=1e-2)
        whole = gf.evaluate(model, tokenizer, forget=FORGET, retain=RETAIN)
        np.testing.assert_array_equal(of.unlearned_value, whole.value)
        there = of.retention.sel(alpha=[0.0, 1.0])
        assert there.values.tolist() == [own, retention(model, tokenizer, "probability")]
    first = gf.evaluate(original, tokenizer, forget=FORGET, retain=RETAIN)
    np.testing.assert_array_equal(result.original_value, first.value)
    assert result.on_grid.sum() == 9
    assert result.retention.sel(alpha=result.on_grid).notnull().all()
    low, high = (result[f"retention_{end}"] for end in ("low", "high"))
    known = result.retention.notnull()
    assert ((low <= result.retention) & (result.retention <= high)).where(known, True).all()


def test_the_share_found_is_the_best_of_a_fine_grid(result, original, unlearned, tokenizer):
    own = retention(original, tokenizer, "probability")
    fine = [k / 64 for k in range(65)]
    keeps = [
        retention(by_hand(original, unlearned, a), tokenizer, "probability") >= 0.8 * own
        for a in fine
    ]
    best = max(a for a, keep in zip(fine, keeps, strict=True) if keep)
    assert best - 1 / 64 <= float(result.alpha_chosen.sel(model="ascent")) <= best + 1 / 64


def test_models_given_are_left_as_they_were(original, unlearned, tokenizer):
    before = [copy.deepcopy(m.state_dict()) for m in (original, unlearned)]
    unlearned.train()
    gf.control(original, unlearned, tokenizer, retain=RETAIN, grid=2, tolerance=0.4)
    assert unlearned.training and unlearned.lm_head.training
    unlearned.eval()
    for model, state in zip((original, unlearned), before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize(
    ("tau", "alpha", "n"), [(0.01, 1.0, 5), (1.0, 0.0, 6)], ids=["all kept", "none kept"]
)
def test_no_share_is_measured_twice(original, gentler, tokenizer, monkeypatch, tau, alpha, n):
    """Retention at 0, 1/2 and 1, once by bisection; all metrics at the ends and the share."""
    from geffect_fast.measure.evaluate import Evaluator

    called, measure = [], Evaluator.measure

    def counted(self, *args, what, **kwargs):
        called.append(what)
        return measure(self, *args, what=what, **kwargs)

    monkeypatch.setattr(Evaluator, "measure", counted)
    found = gf.control(
        original,
        {"m": gentler},
        tokenizer,
        retain=RETAIN,
        metric="probability",
        grid=2,
        tolerance=0.25,
        tau=tau,
    )
    assert found.alpha_chosen.item() == alpha
    assert len(called) == n and called.count("original") == 2
    assert called.count("unlearned m") == 2
    assert set(called) - {"original", "unlearned m"} <= {
        "share 0.5 of unlearned m",
        "share 0.25 of unlearned m",
    }
    end = found.original_value if alpha == 0 else found.unlearned_value.isel(model=0)
    np.testing.assert_array_equal(found.value.isel(model=0), end)


def test_utility_can_be_what_is_kept(original, unlearned, tokenizer):
    """Its number is of the retain data and two probes together."""
    data = {
        "retain": RETAIN,
        "probes": {"real_authors": ROWS[9:13], "world_facts": ROWS[13:17]},
    }
    found = gf.control(
        original,
        unlearned,
        tokenizer,
        **data,
        metric="model_utility",
        metrics="model_utility",
        max_new_tokens=12,
        grid=2,
        tolerance=0.5,
        tau=0.9,
    )
    for alpha, model in ((0.0, original), (1.0, unlearned)):
        expected = gf.evaluate(
            model,
            tokenizer,
            forget=FORGET,
            **data,
            metrics="model_utility",
            max_new_tokens=12,
        ).value.sel(metric="model_utility", set="all")
        of = found.retention.sel(alpha=alpha, model="unlearned")
        assert float(of) == pytest.approx(float(expected), rel=1e-5)
    assert found.retention.sel(alpha=0.0).item() > 0
    assert json.loads(found.attrs["control"])["set"] == "all"


def test_the_same_call_gives_the_same_bits(result, original, unlearned, gentler, tokenizer):
    again = gf.control(
        original,
        {"ascent": unlearned, "gentler": gentler},
        tokenizer,
        retain=RETAIN,
        forget=FORGET,
        metric="probability",
        tau=0.8,
        tolerance=1 / 64,
        grid=8,
    )
    xr.testing.assert_identical(again, result.assign_attrs(created=again.attrs["created"]))


# ---- the command ----


@pytest.fixture(scope="module")
def study(tmp_path_factory, original, unlearned, gentler, tokenizer):
    folder = tmp_path_factory.mktemp("control")
    for name, model in (("original", original), ("ascent", unlearned), ("gentler", gentler)):
        save(model, tokenizer, folder / name)
    write_jsonl(FORGET, folder / "forget.jsonl")
    write_jsonl(RETAIN, folder / "retain.jsonl")
    adapter = adapter_on(load_model(folder / "original"))
    adapter.base_model.model.config._name_or_path = str(folder / "original")
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "original")
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def here(study, tmp_path, monkeypatch):
    folder = shutil.copytree(study, tmp_path / "here")
    file = folder / "adapter/adapter_config.json"
    changed = {"base_model_name_or_path": str(folder / "original")}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    monkeypatch.chdir(folder)
    return folder


def sums(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


COMMAND = ["control", "--original", "original", "--retain", "retain.jsonl", "--grid", "4"]
COMMAND += ["--metric", "probability", "--tolerance", "0.1"]


def test_from_folders_to_a_run_that_replays(here, capsys, original, unlearned):
    before = sums(here)
    command = [*COMMAND, "--unlearned", "ascent", "gentler", "adapter", "--forget", "forget.jsonl"]
    assert main([*command, "--out", "run", "--save", "mixed"]) == 0
    printed = capsys.readouterr().out
    for heading in ("share kept", "fails at", "probability, retain", "without mixing"):
        assert heading in printed
    found = gf.open_evaluation("run")
    assert found["model"].values.tolist() == ["ascent", "gentler", "adapter"]
    after = sums(here)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if ".unfinished" in name]
    # What was saved is the model that was measured.
    for name in ("ascent", "adapter"):
        model = load_model(here / "mixed" / name)
        again = gf.evaluate(
            model,
            load_tokenizer_of(here / "mixed" / name),
            forget="forget.jsonl",
            retain="retain.jsonl",
        )
        of = found.value.sel(model=name)
        np.testing.assert_allclose(of, again.value, rtol=1e-5, atol=1e-7)
    share = float(found.alpha_chosen.sel(model="ascent"))
    weight = load_model(here / "mixed/ascent").lm_head.weight
    assert torch.equal(weight, torch.lerp(original.lm_head.weight, unlearned.lm_head.weight, share))
    # A run folder as others.
    assert main(["control", "--config", "run/run.yaml", "--out", "again", "--quiet"]) == 0
    again = gf.open_evaluation("again")
    xr.testing.assert_identical(again, found.assign_attrs(created=again.attrs["created"]))
    assert main(["control", "--config", "run/run.yaml", "--out", "run", "--quiet"]) == 2
    assert "already holds evaluation.nc" in capsys.readouterr().err
    assert main(["evaluate", "--config", "run/run.yaml", "--out", "other", "--quiet"]) == 2
    assert "is of a control; use geffect-fast control" in capsys.readouterr().err
    assert main(["show", "run"]) == 0
    assert "share kept of each method" in capsys.readouterr().out
    table = pd.read_csv(here / "run/summary.csv", keep_default_na=False)
    assert ",".join(table.columns) == (
        "model,metric,set,statistic,value,value_low,value_high,original_value,unlearned_value,"
        "alpha_chosen,alpha_lost,retention"
    )
    assert len(table) == 3 * found.value.notnull().sum(["metric", "set"]).max()
    for row in table.to_dict("records"):
        of = found.sel(model=row["model"])
        place = {"metric": row["metric"], "set": row["set"]}
        for name in ("value", "original_value", "unlearned_value"):
            assert row[name] == float(of[name].sel(place))
        share = float(of.alpha_chosen)
        assert row["alpha_chosen"] == share
        assert row["retention"] == float(of.retention.sel(alpha=share))


def load_tokenizer_of(folder):
    from geffect_fast.measure.models import load_tokenizer

    return load_tokenizer(folder)


def test_a_curve_that_rises_is_told(result):
    from rich.console import Console

    from geffect_fast.report.tables.control import render_control, rises

    assert bool(result.monotone.all()) and rises(result) == []
    wrong = result.copy(deep=True)
    wrong.retention.loc[{"model": "ascent", "alpha": 0.75}] += 0.5
    wrong["monotone"] = ("model", [False, True])
    (line,) = rises(wrong)
    assert line.startswith("ascent: retention is not monotone along the share (it rises by")
    assert "from 0.625 to 0.75" in line
    console = Console(width=140, record=True)
    console.print(render_control(wrong))
    assert "not monotone" in console.export_text()


# ---- what is refused ----


def changed(model, change):
    model = copy.deepcopy(model)
    change(model)
    return model


def poison(model):
    model.lm_head.weight.data[0, 0] = float("nan")


def too_large(model):
    model.lm_head.weight.data.fill_(3e38)


def other_theta(model):
    model.config.rms_norm_eps = 0.1


def bad_call(**more):
    def call(original, unlearned, tokenizer):
        given = {"retain": RETAIN, "grid": 2, "tolerance": 0.4} | more
        gf.control(
            given.pop("original", original), given.pop("unlearned", unlearned), tokenizer, **given
        )

    return call


def between(change):
    return lambda o, u, t: bad_call(unlearned=changed(u, change))(o, u, t)


def size_of(hidden, layers=2):
    return lambda o, u, t: bad_call(unlearned=make_model(t, Size(hidden=hidden, n_layers=layers)))(
        o, u, t
    )


REFUSED = {
    "the original itself": (lambda o, u, t: bad_call(unlearned=o)(o, u, t), "the original itself"),
    "equal weights": (
        lambda o, u, t: bad_call(unlearned=copy.deepcopy(o))(o, u, t),
        "nothing to mix",
    ),
    "another width": (size_of(16), "and the original's 3"),
    "another depth": (size_of(32, 3), "only the unlearned model has model.layers.2."),
    "another vocabulary": (between(lambda m: m.resize_token_embeddings(400)), "400 x 32"),
    "another precision": (between(lambda m: m.to(torch.bfloat16)), "--dtype float32"),
    "NaN": (between(poison), "lm_head.weight holds 1 NaN"),
    "another config": (between(other_theta), "rms_norm_eps = 0.1"),
    "another kind": (bad_call(unlearned=torch.nn.Linear(2, 2)), "unlearned"),
    "tau 0": (bad_call(tau=0), "tau"),
    "tau above 1": (bad_call(tau=1.2), "tau"),
    "tau NaN": (bad_call(tau=math.nan), "tau"),
    "tolerance 0": (bad_call(tolerance=0), "tolerance"),
    "no grid": (bad_call(grid=0), "grid"),
    "a loss": (bad_call(metric="nll"), "metric nll: it is not between 0 and 1"),
    "several": (bad_call(metric="nll,probability"), "is several"),
    "unknown metric": (bad_call(metric="probabilty"), "'probability'"),
    "membership": (bad_call(metric="min_k"), "no number on retain"),
    "no perturbed answers": (
        bad_call(
            metric="truth_ratio",
            retain=[{k: r[k] for k in ("question", "answer")} for r in RETAIN],
        ),
        "no number on retain",
    ),
    "forget metrics without forget": (bad_call(metrics="min_k"), "reads the forget data"),
    "retrained without forget": (
        lambda o, u, t: bad_call(retain_model=u)(o, u, t),
        "retain_model: it is compared on the forget data",
    ),
    "no models": (bad_call(unlearned={}), "give a model"),
    "a model twice": (bad_call(unlearned=["a", "a"]), "listed twice"),
    "a folder that is there": (bad_call(save="."), "is there already"),
    "no such place": (bad_call(save="nowhere/at/all"), "make it first"),
    "no folder's name": (
        lambda o, u, t: bad_call(unlearned={"a/b": u}, save="new")(o, u, t),
        "no name of a folder",
    ),
    "an unknown setting": (bad_call(gird=3), "did you mean 'grid'"),
    "nothing to keep": (
        lambda o, u, t: bad_call(
            original=make_model(t, Size(hidden=32, n_layers=2)).eval(),
        )(o, u, t),
        "nothing to keep",
    ),
    "adapter of another base": (
        lambda o, u, t: bad_call(unlearned=adapter_on(u))(o, u, t),
        "its base model is not the original",
    ),
    "DoRA": (
        lambda o, u, t: bad_call(unlearned=adapter_on(o, use_dora=True))(o, u, t),
        "of the kind DoRA",
    ),
    "biases": (
        lambda o, u, t: bad_call(unlearned=adapter_on(o, bias="all"))(o, u, t),
        "biases of the model too",
    ),
    "biases of an adapter": (
        lambda o, u, t: bad_call(unlearned=adapter_on(o, lora_bias=True))(o, u, t),
        "biases of its own too (lora_bias)",
    ),
    "logits that are not finite": (
        lambda o, u, t: bad_call(original=changed(o, too_large))(o, u, t),
        "the original gives its answer",
    ),
    "utility without probes": (bad_call(metric="model_utility"), "--probe real_authors"),
    "a whole model and an adapter": (
        lambda o, u, t: bad_call(original=adapter_on(o))(o, u, t),
        "merge that into its base",
    ),
    "an adapter that adds nothing": (
        lambda o, u, t: bad_call(
            unlearned=peft.get_peft_model(
                copy.deepcopy(o), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
            )
        )(o, u, t),
        "nothing to mix",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, original, unlearned, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, said = REFUSED[name]
    with pytest.raises(GEffectError) as caught:
        call(original, unlearned, tokenizer)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


APART = "--save and --out must be different folders, neither inside the other"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--unlearned", "ascent", "--unlearned", "ascent"], "listed twice"),
        (["--unlearned", "nowhere/at/all"], "unlearned all nowhere/at/all does not exist"),
        ([], "--unlearned is missing"),
        (["--unlearned", "ascent", "--tau", "0"], "--tau"),
        (["--unlearned", "ascent", "--metrics", "min_k"], "reads the forget data"),
        (["--unlearned", "ascent", "--save", "gentler"], "--save gentler is there already"),
        (["--unlearned", "original"], "nothing to mix"),
        (["--unlearned", "ascent", "--save", "run"], APART),
        (["--unlearned", "ascent", "--save", "run/models"], APART),
        (["--unlearned", "ascent", "--save", "../here/run"], APART),
        (["--unlearned", "ascent", "--save", "new", "--out", "new/run"], APART),
        (["--unlearned", "ascent", "--data-format", "csv"], "retain.jsonl"),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(here, capsys, more, said):
    before = sums(here)
    assert main([*COMMAND, "--out", "run", *more, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sums(here) == before and not (here / "run").exists()

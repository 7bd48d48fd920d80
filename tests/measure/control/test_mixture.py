"""Mixtures of two models and of adapters, and the saved form of mixtures."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from control_models import (
    adapter_on,
    by_hand,
    logits,
    merged,
)

from geffect_fast.errors import InputError
from geffect_fast.measure import saved_adapters
from geffect_fast.measure.mixture import Mixture, mixed


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
    # The mixture is saved as one adapter, which adds the same.
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
    """The comparison also finds a config of peft that means another scale than the weights."""
    write = saved_adapters.save_adapter

    def another_scale(model, folder, name):
        write(model, folder, name)
        file = folder / "adapter_config.json"
        said = json.loads(file.read_text())
        file.write_text(json.dumps(said | {"lora_alpha": said["lora_alpha"] * 2}))

    for module in ("mixture", "saved_adapters"):
        monkeypatch.setattr(f"geffect_fast.measure.{module}.save_adapter", another_scale)
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
        Mixture(original, unlearned, working, "u").at(1.0)  # leaves `unlearned` in `working`
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

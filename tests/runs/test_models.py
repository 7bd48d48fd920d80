"""Loading models: what is broken is refused with one line, what is whole comes as it was saved."""

import json
import shutil

import pytest
import torch

from geffect_fast.errors import InputError, NonFiniteError
from geffect_fast.runs.models import load_model, load_tokenizer, resolve_device


@pytest.fixture
def copy(study, tmp_path):
    """A copy of the tiny model that a test may break."""
    return shutil.copytree(study / "model", tmp_path / "model")


def refuse(loader, *args, error=InputError):
    with pytest.raises(error) as caught:
        loader(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_whole_model_comes_in_eval_mode_as_saved(study):
    model = load_model(study / "model")
    assert not model.training and model.dtype == torch.float32
    saved = (study / "model" / "model.safetensors").read_bytes()
    assert model.lm_head.weight.detach().numpy().tobytes() in saved
    assert load_model(study / "model", "bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(study / "model").eos_token == "<|end|>"


def test_a_missing_folder(tmp_path):
    assert "does not exist" in refuse(load_model, tmp_path / "none")
    assert "does not exist" in refuse(load_tokenizer, tmp_path / "none")


def test_a_file_instead_of_a_folder(copy):
    assert "is a file" in refuse(load_model, copy / "model.safetensors")


def test_an_unknown_hub_id(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refuse(load_model, "nobody/nothing-at-all")
    assert "nobody/nothing-at-all" in message and "no such folder" in message


def test_no_config(copy):
    (copy / "config.json").unlink()
    assert "no config.json" in refuse(load_model, copy)


def test_a_torn_config(copy):
    (copy / "config.json").write_text("{")
    assert "config.json is not JSON" in refuse(load_model, copy)
    (copy / "config.json").write_text("[]")
    assert "must hold an object" in refuse(load_model, copy)


@pytest.mark.parametrize("kept", [3, 2000])
def test_torn_weights(copy, kept):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "truncated or broken" in refuse(load_model, copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "no weights" in refuse(load_model, copy)


def test_weights_that_lack_parameters_are_refused_not_made_up(copy):
    edit(copy, num_hidden_layers=4)
    message = refuse(load_model, copy)
    assert "lacks model.layers.3." in message and "more" in message


def test_weights_of_other_shapes(copy):
    edit(copy, hidden_size=32)
    assert "shapes" in refuse(load_model, copy)


def test_an_architecture_nobody_knows(copy):
    edit(copy, model_type="nothing")
    assert "cannot be loaded" in refuse(load_model, copy)


def test_what_is_no_causal_language_model(copy):
    edit(copy, architectures=["LlamaModel"])
    assert "not a causal language model" in refuse(load_model, copy)
    edit(copy, architectures=None, model_type="t5")
    assert "not a causal language model" in refuse(load_model, copy)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(study, tmp_path, value):
    model = load_model(study / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = value
        model.model.layers[2].mlp.up_proj.weight[0, 0] = value
    model.save_pretrained(tmp_path / "model")
    message = refuse(load_model, tmp_path / "model", error=NonFiniteError)
    assert "model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite" in message


def test_a_folder_without_tokenizer(copy):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert "no tokenizer files" in refuse(load_tokenizer, copy)


def test_a_torn_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in refuse(load_tokenizer, copy)


def test_a_device_that_is_not_here():
    assert "is not here" in refuse(resolve_device, "cuda:99")
    assert resolve_device("cpu") == torch.device("cpu")


def test_the_settings_of_transformers_logging_are_given_back(study):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(study / "model")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

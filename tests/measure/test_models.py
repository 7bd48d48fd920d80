"""Loading models: sound models come as they were saved; broken ones are in `bad_input/models`."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from geffect_fast.measure.models import load_model, load_tokenizer, resolve_device


def test_a_whole_model_comes_in_eval_mode_as_saved(study):
    model = load_model(study / "model")
    assert not model.training and model.dtype == torch.float32
    saved = (study / "model" / "model.safetensors").read_bytes()
    assert model.lm_head.weight.detach().numpy().tobytes() in saved
    assert load_model(study / "model", "bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(study / "model").eos_token == "<|end|>"


def test_a_module_that_the_architecture_does_not_have_is_left_out(study, tmp_path):
    folder = shutil.copytree(study / "model", tmp_path / "model")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"v_head.summary.weight": torch.ones(1, 16)}, file)
    assert load_model(folder).state_dict().keys() == load_model(study / "model").state_dict().keys()


def test_a_device_that_is_here():
    assert resolve_device("cpu") == torch.device("cpu")


def test_the_settings_of_transformers_logging_are_given_back(study):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(study / "model")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

"""Folders of adapters: they load with their base model, or one line says why not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.storage.run_folder import open_run

pytestmark = pytest.mark.usefixtures("undrawn")

peft = pytest.importorskip("peft")


def make(study, folder, **settings):
    """Save an adapter on the study's model as peft does, away from its starting point."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load_model(study / "model"), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def adapter(study, tmp_path):
    make(study, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refuse(folder):
    with pytest.raises(InputError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_it_comes_as_it_was_saved_and_can_be_trained_on(study, tmp_path, settings):
    saved = make(study, tmp_path / "adapter", **settings)
    loaded = load_model(tmp_path / "adapter")
    assert not loaded.training
    wanted = dict(saved.named_parameters())
    for name, p in loaded.named_parameters():
        assert torch.equal(p, wanted[name]) and p.requires_grad == wanted[name].requires_grad, name
    assert load_tokenizer(tmp_path / "adapter").eos_token == "<|end|>"


@pytest.mark.parametrize(
    ("dtype", "base", "adapter_dtype"),
    [("bfloat16", torch.bfloat16, torch.float32), ("float64", torch.float64, torch.float64)],
)
def test_precision(adapter, dtype, base, adapter_dtype):
    model = load_model(adapter, dtype)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {False: base, True: adapter_dtype} and model.dtype == base


def arguments(study, model, out, *more):
    data = ("--forget", study / "forget.jsonl", "--retain", study / "retain.jsonl")
    words = ("profile", "--model", model, *data, "--objectives", "ga", "--out", out, "-q", *more)
    return [str(word) for word in words]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_profile_of_an_adapter_folder(study, adapter, tmp_path, dtype):
    """A profile covers the adapter's parameters only; a replay gives the same bits."""
    out, again = tmp_path / "run", tmp_path / "again"
    assert main(arguments(study, adapter, out, "--dtype", dtype)) == 0
    result = open_run(out)
    assert result.attrs["layout"] == "packed"
    assert set(result.kind.values) == {"q_proj.lora_A", "q_proj.lora_B"}
    assert sorted(set(result.block.values)) == [0, 1, 2]
    words = ["profile", "--config", str(out / "run.yaml"), "--out", str(again), "-q"]
    assert main(words) == 0
    assert np.array_equal(open_run(again).g_effect, result.g_effect)


def test_check_of_an_adapter_folder(study, adapter, capsys):
    words = ["check", "--model", str(adapter), "--data", str(study / "forget.jsonl")]
    assert main([*words, "--samples", "2"]) == 0
    assert "Exact: all 6 trainable parameters" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_as_reference(study, adapter, tmp_path):
    """The model is the adapter's base, so the reference is neither the model nor its base."""
    words = ("--objectives", "npo", "--reference", adapter)
    assert main(arguments(study, study / "model", tmp_path / "run", *words)) == 0
    assert main(arguments(study, study / "model", tmp_path / "own", "--objectives", "npo")) == 0
    losses = [open_run(tmp_path / name).loss for name in ("run", "own")]
    values = [loss.sel(objective="npo").item() for loss in losses]
    assert abs(values[0] - values[1]) > 1e-4


def test_what_is_broken_is_refused(study, adapter, tmp_path, monkeypatch):
    def copied(name):
        return shutil.copytree(adapter, tmp_path / name)

    gone = copied("gone")
    edit(gone, base_model_name_or_path=str(tmp_path / "nowhere"))
    assert "base model" in refuse(gone) and "does not exist" in refuse(gone)

    silent = copied("silent")
    edit(silent, base_model_name_or_path=None)
    assert "names no base_model_name_or_path" in refuse(silent)

    torn = copied("torn")
    (torn / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not JSON" in refuse(torn)

    empty = copied("empty")
    (empty / "adapter_model.safetensors").unlink()
    assert "the adapter cannot be loaded" in refuse(empty)

    wider = copied("wider")
    edit(wider, target_modules=["q_proj", "v_proj"])
    assert "v_proj" in refuse(wider) and "not among the adapter's weights" in refuse(wider)

    narrower = copied("narrower")
    edit(narrower, layers_to_transform=[0, 1])
    assert "only among the adapter's weights" in refuse(narrower)

    other_rank = copied("other_rank")
    edit(other_rank, r=3)
    assert "the adapter cannot be loaded" in refuse(other_rank)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "an adapter of peft, which is not installed" in refuse(adapter)

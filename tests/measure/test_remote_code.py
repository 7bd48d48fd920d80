"""Code in a model's folder runs only where it was allowed, and there is no prompt."""

from __future__ import annotations

import json
import shutil

import pytest
from interrupted import interrupted_at

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.measure.models import has_remote_code, load_model, load_tokenizer
from geffect_fast.storage.run_yaml import load_config

pytestmark = pytest.mark.usefixtures("undrawn")

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(study, tmp_path, monkeypatch):
    """A copy of the study's model with code of its own, and the file that the code makes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = shutil.copytree(study / "model", tmp_path / "model")
    (folder / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tmp_path / "ran"


def options(study, folder, out):
    data = ["--forget", str(study / "forget.jsonl"), "--retain", str(study / "retain.jsonl")]
    return ["--model", str(folder), *data, "--quiet", "--out", str(out)]


def test_it_runs_where_it_is_allowed_and_nowhere_else(own, study, tmp_path, capsys):
    folder, ran = own
    words = ["profile", *options(study, folder, tmp_path / "run"), "--objectives", "ga"]
    assert main(words) == 2 and not ran.exists() and not (tmp_path / "run").exists()
    assert "--trust-remote-code" in capsys.readouterr().err
    with pytest.raises(InputError, match="trust_remote_code=True"):
        load_model(folder)
    assert not ran.exists()
    assert main([*words, "--trust-remote-code"]) == 0 and ran.exists()
    assert load_config(tmp_path / "run" / "run.yaml").trust_remote_code is True
    model = load_model(folder, trust_remote_code=True)
    assert has_remote_code(model) and not has_remote_code(load_model(study / "model"))
    tokenizer = load_tokenizer(study / "model")
    data = {name: str(study / f"{name}.jsonl") for name in ("forget", "retain")}
    with pytest.raises(InputError, match="trust_remote_code=True"):
        gf.profile(model, tokenizer, **data, objectives=["npo"], reference_model=folder)
    gf.profile(
        *(model, tokenizer),
        **data,
        objectives=["npo"],
        reference_model=folder,
        trust_remote_code=True,
    )


def test_a_training_goes_on_from_its_own_checkpoint(own, study, tmp_path):
    folder, _ = own
    words = ["unlearn", *options(study, folder, tmp_path / "run"), "--trust-remote-code"]
    words += ["--objective", "ga", "--steps", "2", "--batch-size", "2"]
    with interrupted_at(2):
        assert main(words) == 130
    assert main(["unlearn", "--resume", "--quiet", "--out", str(tmp_path / "run")]) == 0


def test_a_model_that_transformers_has_does_without_the_code(study, tmp_path):
    folder = shutil.copytree(study / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    assert not has_remote_code(load_model(folder))


def test_help_says_what_it_means(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("profile", "sweep", "unlearn", "check"):
        assert main([command, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "--trust-remote-code" in said and "with all your rights" in said

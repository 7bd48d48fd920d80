"""`relearn`, `control` and the survey give on several ranks the numbers of one process."""

import copy
import itertools
import os
import shutil

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from control_models import adapter_on
from memorised import blank_model, tokenizer_of
from ranked import on_ranks
from safetensors.torch import load_file

import geffect_fast as gf
from geffect_fast import ranks, report
from geffect_fast.capture.shards import shard
from geffect_fast.cli import main
from geffect_fast.demo.authors import make_fictitious_authors
from geffect_fast.errors import InputError

DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--quiet"]
RELEARN = "relearn --model ga/model --forget forget.jsonl --steps 2 --rows 2 --learning-rate 0.01"
CONTROL = "control --original model --unlearned ga/model --metric probability --grid 4"
SURVEY = "evaluate --model ga/model --suite survey --holdout general.jsonl "
SURVEY += "--relearn steps=2 --relearn learning_rate=0.01"
COMMANDS = {
    "relearn": [*RELEARN.split(), "--measure-every", "1", "--quiet"],
    "control": [*CONTROL.split(), "--tolerance", "0.1", "--save", "mixed-WAY", *DATA],
    "survey": [*SURVEY.split(), "--relearn", "n_rows=2", "--max-new-tokens", "5", *DATA],
}


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory, undrawn):
    """A study whose model was unlearned."""
    folder = shutil.copytree(study, tmp_path_factory.mktemp("neighbours") / "here")
    words = ["unlearn", "--model", "model", *DATA, "--objective", "ga", "--steps", "2"]
    words += ["--probe-every", "2", "--no-second-order"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*words, "--lr", "0.01", "--out", "ga"]) == 0
    return folder


def commanded(folder, *ways):
    """The exit codes of all commands on this rank, with each way to hold a model."""
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_, **__: None)
        return [
            main([word.replace("WAY", way) for word in [*words, "--out", f"{name}-WAY", *held]])
            for way in ways
            for held in [[] if way == "alone" else ["--shard", way]]
            for name, words in COMMANDS.items()
        ]


@pytest.mark.slow
def test_ranks_say_what_one_process_says(folder):
    assert commanded(folder, "alone") == [0] * 3
    assert on_ranks(2, commanded, folder, "none", "fsdp") == [[0] * 6] * 2
    for way, name in itertools.product(("none", "fsdp"), COMMANDS):
        one, other = (gf.open_evaluation(folder / f"{name}-{each}") for each in ("alone", way))
        assert set(one.data_vars) == set(other.data_vars)
        for variable, values in one.data_vars.items():
            if values.dtype.kind == "f" and variable not in ("seconds", "peak_memory"):
                apart = abs(other[variable] - values).max()
                assert not apart > 1e-5 * abs(values).max(), (name, variable)
                assert (other[variable].isnull() == values.isnull()).all(), (name, variable)
    alone, *others = (
        sorted((f.name, f.stat().st_size) for f in (folder / f"mixed-{way}").rglob("*.*"))
        for way in ("alone", "none", "fsdp")
    )
    assert others == [alone] * 2


ROWS = make_fictitious_authors(2, seed=3)
LEARNED = {"forget": ROWS[:5], "n_rows": 2, "steps": 3, "measure_every": 1, "learning_rate": 3e-3}
LEARNED |= {"optimizer": "adamw_torch", "max_grad_norm": 0.5, "metrics": "nll"}
KEPT = {"retain": ROWS[5:9], "forget": ROWS[:3], "metric": "probability", "tau": 0.9, "grid": 4}
KEPT |= {"tolerance": 0.1, "metrics": ["nll"]}
PAIRS = {
    "models": lambda base: (base, moved(base)),
    "an adapter": lambda base: (base, adapter_on(base, 4, modules_to_save=["lm_head"])),
    "two adapters": lambda base: (
        adapter_on(base, 3),
        adapter_on(base, 4, r=3, target_modules=["v_proj", "embed_tokens"]),
    ),
}


def moved(base):
    torch.manual_seed(3)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def held(*models):
    """Copies of models; where there are ranks, each rank holds its parts."""
    models = [copy.deepcopy(model) for model in models]
    for model in models if dist.is_initialized() else ():
        shard(model, ranks.here(), torch.device("cpu"))
    return models


def as_it_is(model):
    """State of a model that a call must restore: values, trained parameters, modes, gradients."""
    state = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    return (
        state,
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [module.training for module in model.modules()],
    )


def called(where):
    """Results of the functions for models that ranks hold, which must be left as they were."""
    reads = tokenizer_of(ROWS)
    base, other = (blank_model(reads, seed).double() for seed in (1, 2))
    folder = where / "retrained"
    if ranks.here().first:
        other.save_pretrained(folder)
    ranks.here().meet()
    given = held(base)
    before = [as_it_is(each) for each in given]
    (model,) = given
    found = {"relearn": gf.relearn(model, reads, original=model, retrained=folder, **LEARNED)}
    for name, pair in PAIRS.items():
        pair = held(*pair(base))
        given += pair
        before += [as_it_is(each) for each in pair]
        original, unlearned = pair
        save = f"{where}/{name}"
        found[name] = gf.control(original, {"u": unlearned}, reads, save=save, **KEPT)
    for each, (state, *more) in zip(given, before, strict=True):
        now, *others = as_it_is(each)
        assert others == more and now.keys() == state.keys()
        assert all(torch.equal(now[name], state[name]) for name in state)
    return found


def refused():
    """Messages about models that are refused."""
    reads = tokenizer_of(ROWS)
    base = blank_model(reads)
    model, other = held(base, moved(base))
    said = []
    for call in (
        lambda: gf.control(model, moved(base), reads, **KEPT),
        lambda: gf.control(model, held(base)[0], reads, **KEPT),
        lambda: gf.relearn(other, reads, **LEARNED | {"optimizer": "adafactor"}),
    ):
        with pytest.raises(InputError) as error:
            call()
        said.append(str(error.value))
    one, another = held(adapter_on(base, 3), adapter_on(base, 4))
    before = as_it_is(one)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no luck"):
        patch.setattr(peft, "set_peft_model_state_dict", no_luck)
        gf.control(one, another, reads, **KEPT)
    assert str(as_it_is(one)) == str(before)
    with pytest.raises(InputError, match="gradients of two adapters, of which FSDP shares out"):
        norms = {"metrics": ["gradient_norm"], "holdout": ROWS[9:11]}
        gf.control(one, another, reads, **KEPT | norms)
    assert str(as_it_is(one)) == str(before)
    return said


def no_luck(*_, **__):
    raise OSError("no luck")


def both(where):
    return called(where), refused()


@pytest.mark.slow
def test_models_in_parts_are_relearned_and_mixed_as_whole_ones(tmp_path):
    for way in ("alone", "parts"):
        (tmp_path / way).mkdir()
    alone = called(tmp_path / "alone")
    for found, said in on_ranks(2, both, tmp_path / "parts"):
        for name, expected in alone.items():
            for same in {"training", "control", "digests", "relearned_rows"} & {*expected.attrs}:
                assert found[name].attrs[same] == expected.attrs[same]
            for variable, values in expected.data_vars.items():
                np.testing.assert_allclose(
                    found[name][variable], values, rtol=1e-9, atol=1e-12, err_msg=name
                )
        assert said[0].startswith("unlearned unlearned: FSDP shares out one of the two models")
        assert said[1].startswith("unlearned unlearned: its weights are the original's")
        assert said[2].startswith("optimizer: adafactor is not known to step parts of weights")
    assert 0 < float(alone["models"].alpha_chosen) < 1
    for name in PAIRS:
        (file,) = (tmp_path / "alone" / name / "u").glob("*.safetensors")
        whole, parts = (
            load_file(file.parents[3] / way / name / "u" / file.name) for way in ("alone", "parts")
        )
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)

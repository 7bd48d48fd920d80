"""Measures equal those of one process on any number of ranks, and are the same on all ranks."""

import io
import json
import os
import warnings
from contextlib import redirect_stderr
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr
from evaluated import full_rows, without
from memorised import blank_model, tokenizer_of
from peft import LoraConfig, get_peft_model
from ranked import on_ranks
from torch.distributed.fsdp import fully_shard

import geffect_fast as gf
from geffect_fast import ranks, report
from geffect_fast.capture.parts import mesh_over
from geffect_fast.capture.shards import shard
from geffect_fast.cli import main
from geffect_fast.data import write_jsonl
from geffect_fast.demo import save
from geffect_fast.errors import GEffectWarning, InputError
from geffect_fast.metrics import available

ROWS = full_rows()
FEW = {"forget": ROWS[:1], "retain": ROWS[1:2], "holdout": ROWS[2:3]}
FEW["metrics"] = ["nll", "rouge_l", "gradient_norm(convention=mimir)", "truth_ratio"]
EVERY = {
    "forget": ROWS[:5],
    "retain": ROWS[8:12],
    "holdout": without(ROWS[16:20], "perturbed_answer", "paraphrased_answer"),
    "probes": {
        "real_authors": without(ROWS[22:24], "paraphrased_answer"),
        "world_facts": without(ROWS[24:27], "paraphrased_answer"),
    },
    "metrics": list(available()),
}


@cache
def tokenizer(size=320):
    return tokenizer_of(ROWS, size)


def measured(more, *, in_parts=False):
    reads, more = tokenizer(), dict(more)
    model = blank_model(reads, 1).double()
    other = blank_model(tokenizer(more.pop("vocabulary", 320)), 2).double()
    for each in (model, other) if in_parts else ():
        shard(each, ranks.here(), torch.device("cpu"))
    given = {"reference_model": other, "retain_model": other, "token_budget": 200}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GEffectWarning)
        return gf.evaluate(model, reads, **given, max_new_tokens=6, **more)


def both():
    return measured(EVERY), measured(FEW)


def parts():
    """Measures of models that ranks share out."""
    with pytest.raises(InputError) as error:
        measured(FEW | {"metrics": "nll, reference", "vocabulary": 280}, in_parts=True)
    whole, model = adapted(), adapted()
    for module in (*model.base_model.model.model.layers, model):
        mesh = mesh_over(ranks.here(), torch.device("cpu"))
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    given = FEW | {"max_new_tokens": 6}
    with ranks.on_its_own():
        expected = gf.evaluate(whole, tokenizer(), **given)
    assert_close(gf.evaluate(model, tokenizer(), **given), expected)
    return measured(EVERY, in_parts=True), measured(FEW, in_parts=True), str(error.value)


def adapted():
    """A model with an adapter that changes its outputs."""
    torch.manual_seed(5)
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(blank_model(tokenizer()).double(), settings).eval()


def other_arguments():
    wrong = [*ROWS[0]["perturbed_answer"][:-1], "another"]
    others = {
        "metrics": FEW | {"metrics": FEW["metrics"][1:]},
        "retain": FEW | {"retain": ROWS[2:3]},
        "forget": FEW | {"forget": [ROWS[0] | {"perturbed_answer": wrong}]},
    }
    said = {}
    for name, other in others.items():
        with pytest.raises(InputError) as error:
            measured(other if dist.get_rank() == 1 else FEW)
        said[name] = str(error.value)
    return said


def assert_close(found, expected):
    assert set(found.data_vars) == set(expected.data_vars)
    for name, values in expected.data_vars.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.fixture(scope="module")
def alone():
    return both()


def test_ranks_measure_what_one_process_measures(alone):
    first, *others = on_ranks(3, both)
    for mine, expected in zip(first, alone, strict=True):
        assert_close(mine, expected)
        assert mine.attrs["digests"] == expected.attrs["digests"]
    for other in others:
        for found, mine in zip(other, first, strict=True):
            xr.testing.assert_identical(found, mine)


@pytest.mark.slow
def test_models_in_parts_are_measured_as_whole_ones(alone):
    for *found, refused in on_ranks(2, parts):
        for mine, expected in zip(found, alone, strict=True):
            assert_close(mine, expected)
        assert refused.startswith("reference_model: its vocabulary has 280 tokens and the first")


def test_ranks_are_given_the_same():
    for said in on_ranks(2, other_arguments):
        assert said["metrics"].startswith("metrics: rank 1 has ")
        for name in ("retain", "forget"):
            assert said[name].startswith(f"{name}: rank 1 has 1 rows of digest ")


def commanded(folder, *words):
    """Exit code and errors of the command on this rank."""
    os.chdir(folder)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(report, "write_report", lambda *_, **__: None)
        words = ["evaluate", "--models", "one", "two", "--quiet", *words]
        words += ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]
        words += ["--metrics", "nll,rouge_l", "--max-new-tokens", "6"]
        return main(words), said.getvalue()


def of_folder(folder):
    return sorted(f.name for f in folder.iterdir()), gf.open_evaluation(folder)


def commands(folder):
    return [
        commanded(folder, "--out", "ranks"),
        commanded(folder, "--out", "parts", "--shard", "fsdp"),
    ]


def test_the_first_rank_writes_the_folder(tmp_path):
    reads = tokenizer()
    for seed, name in ((1, "one"), (2, "two")):
        save(blank_model(reads, seed), reads, tmp_path / name)
    for name in ("forget", "retain"):
        write_jsonl(FEW[name] * 3, tmp_path / f"{name}.jsonl")
    assert commanded(tmp_path, "--out", "alone")[0] == 0
    assert on_ranks(2, commands, tmp_path) == [[(0, "")] * 2] * 2
    names, expected = of_folder(tmp_path / "alone")
    for out in ("ranks", "parts"):
        assert of_folder(tmp_path / out)[0] == names
        found = gf.open_evaluation(tmp_path / out)
        for name, values in expected.data_vars.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


TASKS = {
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_choice": "perturbed_answer",
        "process_results": "!function said.total",
    },
    "written": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["xq"], "max_gen_toks": 9},
        "process_results": "!function said.numbers",
    },
}
SAID = """
def total(doc, results):
    return {"score": sum(each[0] for each in results)}

def numbers(doc, results):
    return {"score": sum(map(ord, results[0]))}
"""


def tasks_in(folder):
    """Settings of tasks that give scores for any model."""
    write_jsonl(ROWS[:5], folder / "asked.jsonl")
    kept = {"data_files": {"test": str(folder / "asked.jsonl")}, "cache_dir": str(folder)}
    (folder / "said.py").write_text(SAID, encoding="utf-8")
    for name, own in TASKS.items():
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": kept, "test_split": "test"}
        task |= {"doc_to_text": "{{question}}", "doc_to_target": 0, **own}
        task["metric_list"] = [{"metric": "score", "aggregation": "mean", "higher_is_better": True}]
        text = json.dumps(task).replace('"!function', "!function").replace('.total"', ".total")
        text = text.replace('.numbers"', ".numbers")
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return {"lm_eval_tasks": list(TASKS), "lm_eval_include": str(folder), "lm_eval_batch_size": 2}


def with_tasks(tasks):
    """Measures of a whole model, and of a model and an adapter that ranks share out."""
    tasks_of = pytest.importorskip("lm_eval.tasks")
    on_several = dist.is_initialized()
    if on_several:  # torchrun sets these, and the harness reads them
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
    few = FEW | {"metrics": ["nll"]} | tasks
    model = adapted()
    if on_several:
        shard(model, ranks.here(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:  # reading 13,000 tasks takes long
        own = partial(tasks_of.TaskManager, include_defaults=False)
        patch.setattr(tasks_of, "TaskManager", own)
        return [
            measured(few),
            measured(few, in_parts=on_several),
            gf.evaluate(model, tokenizer(), **few),
        ]


def test_ranks_share_out_tasks(tmp_path):
    tasks = tasks_in(tmp_path)
    alone = with_tasks(tasks)
    for each in alone:
        assert each.value.sel(metric=["chosen/score", "written/score"], set="lm_eval").all()
    for found in on_ranks(2, with_tasks, tasks):
        for mine, expected in zip(found, alone, strict=True):
            assert_close(mine, expected)

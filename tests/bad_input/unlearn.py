"""Unlearning runs: the training, its probes, and resuming."""

from __future__ import annotations

import shutil
import sys

import torch
from bad_input.case import Case, both, holds, patched
from models import build, samples
from torch import nn
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.errors import GEffectError
from geffect_fast.storage.run_yaml import dump_config
from geffect_fast.training.rule_losses import updater_of
from geffect_fast.training.trainer_arguments import check_precision
from geffect_fast.unlearn_settings import Training, UnlearnConfig

DATA = {"forget": samples([5, 7, 4], 1), "retain": samples([6, 3], 2)}


def unlearn(*more: str, **changes: str | None) -> list[str]:
    """An `unlearn` command line that works, with some options changed; None leaves one out."""
    options = {
        "model": "model",
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "objective": "ga",
        "steps": "2",
        "out": "run",
    } | changes
    pairs = [(f"--{key.replace('_', '-')}", value) for key, value in options.items()]
    return ["unlearn", "--quiet", *(w for p in pairs if p[1] is not None for w in p), *more]


def call(model=None, **changes):
    """`gf.unlearn` with some arguments changed."""
    given = DATA | {"objective": "ga", "steps": 1, "out": "run"}

    def run(here):
        made = build("llama") if model is None else model()
        gf.unlearn(made, None, **(given | changes | {"out": here / "run"}))

    return run


class NoLinear(nn.Module):
    """A language model without a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, input_ids, **_):
        return self.embed(input_ids) * self.scale


def without_wandb():
    """Raise the error that transformers' callback raises where wandb is missing."""
    raise RuntimeError("it requires wandb to be installed. Run `pip install wandb`.")


def unfinished(here, _patch):
    """The files of a run that was stopped before its end, in the folder `run`."""
    config = checked_config(
        UnlearnConfig,
        {
            "model": str(here / "model"),
            "forget": str(here / "forget.jsonl"),
            "retain": str(here / "retain.jsonl"),
            "objective": "ga",
            "steps": 2,
        },
    )
    holds("run/run.yaml", dump_config(config))(here, None)
    (here / "run/steps").mkdir()


a_run = both(unfinished, holds("run/results.nc", "whole"))


def blows_up(here):
    """Train until the weights are no numbers; the steps before that are written."""
    before = {path.name for path in here.iterdir()}
    try:
        gf.unlearn(
            build("llama"),
            None,
            **DATA,
            objective="ga",
            steps=9,
            optimizer="sgd",
            learning_rate=1e30,
            out=here / "run",
        )
    except GEffectError:
        assert (here / "run/steps/step-00000000.nc").exists()
        shutil.rmtree(here / "run")
        assert {path.name for path in here.iterdir()} == before
        raise


CASES = [
    # ---- the training ----
    Case(
        "an unknown objective to train on",
        unlearn(objective="gaa"),
        "--objective: unknown",
        "did you mean 'ga'?",
    ),
    Case("no objective to train on", unlearn(objective=None), "--objective is missing", "give it"),
    Case("two objectives to train on", unlearn(objective="ga,npo"), "--objective", "','"),
    Case(
        "the objective twice",
        unlearn(objectives="ga"),
        "--objectives: 'ga' is the objective to train on",
        "leave it out",
    ),
    Case(
        "the objective twice, written otherwise",
        unlearn(objective="npo(beta=0.1)", objectives="npo"),
        "is the objective to train on",
        "leave it out",
    ),
    Case(
        "an objective that needs refusals",
        unlearn(objective="po"),
        "needs refusals",
        "--refusals FILE",
    ),
    Case(
        "another objective that needs refusals",
        unlearn(objectives="dpo"),
        "needs refusals",
        "--refusals FILE",
    ),
    Case("no steps", unlearn(steps="0"), "--steps: should be", "greater than 0, got 0"),
    Case("how many steps nobody says", unlearn(steps=None), "--steps is missing", "give it"),
    Case(
        "an unknown optimizer",
        unlearn(optimizer="adamw_troch"),
        "optimizer: unknown 'adamw_troch'",
        "did you mean 'adamw_torch'?",
    ),
    Case(
        "an unknown scheduler",
        unlearn(scheduler="cosin"),
        "scheduler: unknown 'cosin'",
        "did you mean 'cosine'?",
    ),
    Case(
        "an unknown field of the trainer",
        unlearn(trainer="weight_deccay=1"),
        "trainer: unknown 'weight_deccay'",
        "did you mean 'weight_decay'?",
    ),
    Case(
        "a field of the trainer that is ours",
        unlearn(trainer="max_steps=9"),
        "max_steps is decided by --steps",
        "use that",
    ),
    Case(
        "a field of the trainer without a value",
        unlearn(trainer="weight_decay"),
        "--trainer 'weight_decay'",
        "FIELD=VALUE",
    ),
    Case(
        "an unknown reporter",
        unlearn(report_to="tensorboard,wandbb"),
        "report_to: unknown 'wandbb'",
        "did you mean 'wandb'?",
    ),
    Case(
        "a reporter without its package",
        unlearn(report_to="tensorboard"),
        "report_to: tensorboard is not installed",
        "pip install tensorboard",
        broken=lambda _, patch: patch.setitem(sys.modules, "tensorboard", None),
    ),
    Case(
        "a reporter that transformers cannot begin with",
        unlearn(report_to="wandb"),
        "report_to: wandb cannot be used: it requires wandb",
        "or leave it out",
        broken=lambda _, patch: patch.setitem(INTEGRATION_TO_CALLBACK, "wandb", without_wandb),
    ),
    Case(
        "a reporter named twice over",
        unlearn(trainer="report_to=wandb", report_to="tensorboard"),
        "report_to is decided by --report-to",
        "use that",
    ),
    Case(
        "a field of the trainer of another kind",
        unlearn(trainer="logging_strategy=often"),
        "trainer: ",
        "correct it or leave it out",
    ),
    Case(
        "a field of the trainer that is fixed here",
        unlearn(trainer="remove_unused_columns=true"),
        "trainer: remove_unused_columns is not served",
        "leave it out",
    ),
    Case(
        "a field of the trainer for data that are loaded otherwise",
        unlearn(trainer="dataloader_num_workers=-1"),
        "trainer: dataloader_num_workers is not served",
        "leave it out",
    ),
    Case(
        "a field of the trainer that adds noise",
        unlearn(trainer="neftune_noise_alpha=5"),
        "trainer: neftune_noise_alpha is not served",
        "leave it out",
    ),
    Case(
        "a field of the trainer that is gone",
        unlearn(trainer="group_by_length=true"),
        "trainer: unknown 'group_by_length'",
        "choose from weight_decay, ",
    ),
    Case(
        "a negative weight decay",
        unlearn(trainer="weight_decay=-1"),
        "trainer: weight_decay should be greater than or equal to 0, got -1",
        "correct it",
    ),
    Case(
        "a weight decay in a word",
        unlearn(trainer="weight_decay=abc"),
        "trainer: weight_decay should be a valid number",
        "got 'abc'; correct it",
    ),
    Case(
        "a list for a number",
        unlearn(trainer="max_grad_norm=[1, 2]"),
        "trainer: max_grad_norm should be a valid number",
        "got [1, 2]; correct it",
    ),
    Case(
        "a list for fields by name",
        unlearn(trainer="lr_scheduler_kwargs=[1, 2]"),
        "trainer: lr_scheduler_kwargs should be a valid dictionary",
        "correct it",
    ),
    Case(
        "momentum beyond 1",
        unlearn(trainer="adam_beta1=5"),
        "trainer: adam_beta1 should be less than 1, got 5",
        "correct it",
    ),
    Case(
        "a scheduler that needs more than is given",
        unlearn(scheduler="cosine_with_min_lr"),
        "scheduler cosine_with_min_lr, or trainer: ",
        "correct it or choose another",
    ),
    Case(
        "fp16 on a CPU",
        unlearn(precision="fp16", device="cpu"),
        "precision: fp16 needs a GPU",
        "use bf16",
    ),
    Case(
        "fp16 for weights in float16",
        lambda _: check_precision(
            Training(steps=1, precision="fp16"), nn.Linear(2, 2, device="meta", dtype=torch.half)
        ),
        "precision: fp16 scales gradients",
        "--dtype float32",
    ),
    Case(
        "a negative learning rate",
        unlearn(learning_rate="-1"),
        "--learning-rate: should be",
        "greater than or equal to 0",
    ),
    Case(
        "a learning rate that is no number",
        unlearn(learning_rate="nan"),
        "--learning-rate",
        "finite number",
    ),
    Case(
        "another precision",
        unlearn(precision="int8"),
        "--precision",
        "choose from model, bf16, fp16",
    ),
    Case(
        "more rows a batch than there are", unlearn(batch_size="5"), "batch_size: 5", "give fewer"
    ),
    Case(
        "more rows an update than there are",
        unlearn(batch_size="2", accumulation="3"),
        "batch_size: 2 times 3",
        "give fewer",
    ),
    Case("a loss that is not finite", blows_up, "step ", "try a smaller --learning-rate"),
    Case(
        "a path for a model to train",
        lambda here: gf.unlearn("model", None, **DATA, objective="ga", steps=1),
        "model: expected a loaded model",
        "load it with",
    ),
    # ---- update rules ----
    Case(
        "an unknown update rule",
        unlearn(update="ortograd"),
        "--update: unknown update 'ortograd'",
        "did you mean 'orthograd'?",
    ),
    Case(
        "a tolerance of the rank that is no part",
        unlearn(update="orthograd(rank_tol=1)"),
        "rank_tol must be a finite number above 0 and below 1",
        "got 1",
    ),
    Case(
        "a tolerance of the rank of nothing",
        unlearn(update="orthograd(rank_tol=0)"),
        "rank_tol must be a finite number above 0 and below 1",
        "got 0",
    ),
    Case(
        "two update rules",
        unlearn(update="gru + gu"),
        "--update: unexpected '+'",
        "expected the end",
    ),
    Case(
        "a range in an update rule",
        unlearn(update="gru(gamma=0.1:0.9:3)"),
        "--update: a range is no value here",
        "give one number",
    ),
    Case(
        "a penalty without a radius",
        unlearn(update="sam(rho=0, penalty=1)"),
        "penalty takes differences of gradients rho apart",
        "give rho",
    ),
    Case(
        "a rule that adds a retain gradient, and none",
        unlearn(update="sago"),
        "update sago: the retain gradient is part of the update, and 'ga' has no retain part",
        "add one, such as 'ga + nll'",
    ),
    Case(
        "a rule in the metric of an optimizer that it does not know",
        unlearn(update="gu", optimizer="adagrad"),
        "does not know that of Adagrad",
        "use sgd, adam or adamw",
    ),
    Case(
        "weights that a rule moves by less than they hold",
        unlearn(update="sam", dtype="bfloat16"),
        "in bfloat16 rounds away",
        "train in float32",
    ),
    Case(
        "gradients that are scaled",
        lambda _: updater_of(Training(steps=1, precision="fp16", update="gru"), nn.Linear(2, 2)),
        "update gru: --precision fp16 scales gradients up",
        "use bf16",
    ),
    Case(
        "more retain rows than memory for their products",
        unlearn(update="orthograd"),
        "the inner products of 4 retain rows take",
        "use fewer retain rows",
        patched("geffect_fast.updates.retain_rows.free_memory", lambda device: 100),
    ),
    # ---- adapters ----
    Case(
        "a rank on a model without linear layers",
        call(NoLinear, lora_rank=2),
        "lora_rank: NoLinear has no linear layers",
        "leave lora_rank out",
    ),
    Case(
        "modules to adapt that are not there",
        unlearn(lora_rank="2", lora_targets="no_proj"),
        "has no no_proj to adapt",
        "give lora_targets",
    ),
    Case("no rank", unlearn(lora_targets="q_proj"), "lora_rank: is missing", "give it"),
    Case("a rank of nothing", unlearn(lora_rank="0"), "--lora-rank: should be", "greater than 0"),
    Case(
        "a rank without peft",
        unlearn(lora_rank="2"),
        "needs peft",
        "pip install peft",
        lambda here, patch: patch.setattr("importlib.util.find_spec", lambda *a: None),
    ),
    # ---- probes ----
    Case(
        "probes rarer than steps",
        unlearn(probe_every="3"),
        "--probe-every: 3 is more than",
        "give at most as many",
    ),
    Case("no probe rows", unlearn(probe_rows="0"), "--probe-rows: must be", "or all"),
    Case("probe rows in a word", unlearn(probe_rows="some"), "--probe-rows: must be", "or all"),
    Case(
        "checkpoints between probes",
        unlearn(steps="6", probe_every="2", save_every="3"),
        "--save-every: 3 is no multiple",
        "give one",
    ),
    Case("an unknown set to probe", unlearn(probe="general=gone.jsonl"), "gone.jsonl", "give"),
    Case("a misspelt field", call(step=3), "unknown field 'step'", "did you mean 'steps'?"),
    # ---- folders ----
    Case("resume of nothing", unlearn("--resume"), "holds no run to resume", "leave out --resume"),
    Case(
        "resume of nothing, from Python",
        call(resume=True),
        "holds no run to resume",
        "leave out --resume",
    ),
    Case(
        "resume and overwrite",
        unlearn("--resume", "--overwrite"),
        "--resume goes on",
        "give only one",
    ),
    Case(
        "resume of a run that is complete",
        unlearn("--resume"),
        "is complete",
        "choose another --out",
        a_run,
    ),
    Case(
        "resume with other steps",
        unlearn("--resume", steps="3"),
        "steps is 3",
        "was begun with 2",
        unfinished,
    ),
    Case(
        "resume with another objective",
        unlearn("--resume", objective="npo"),
        "objective is npo",
        "was begun with ga",
        unfinished,
    ),
    Case(
        "out folder of another run", unlearn(), "already holds results.nc", "use --overwrite", a_run
    ),
    Case(
        "out folder of an unfinished run",
        unlearn(),
        "already holds run.yaml",
        "go on with --resume",
        unfinished,
    ),
    Case(
        "resume of a profile",
        unlearn("--resume"),
        "is of a run of profile",
        "profile --config",
        holds(
            "run/run.yaml",
            "command: profile\nmodel: model\nforget: forget.jsonl\n"
            "retain: retain.jsonl\nobjectives: [ga]\n",
        ),
    ),
    Case(
        "a config of a profile",
        ["unlearn", "--config", "run.yaml", "--out", "run", "--objective", "ga", "--steps", "2"],
        "is of a run of profile",
        "use geffect-fast profile",
        holds(
            "run.yaml",
            "command: profile\nmodel: model\nforget: forget.jsonl\n"
            "retain: retain.jsonl\nobjectives: [ga]\n",
        ),
    ),
    Case(
        "a checkpoint that is not ours",
        unlearn("--overwrite"),
        "holds checkpoint-1",
        "choose another --out",
        holds("run/checkpoint-1/model.safetensors", ""),
    ),
    Case(
        "a step file that is not ours",
        unlearn("--resume"),
        "step-00000001.nc",
        "move the file away",
        both(unfinished, holds("run/steps/step-00000001.nc", "torn")),
    ),
]

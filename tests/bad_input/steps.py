"""Runs of several steps: bad checkpoints, step files of other runs, disks that fill up."""

from __future__ import annotations

import shutil

import torch
from bad_input.case import Case, both, cut, gone, holds, patched, profile, settings, weight
from bad_input.folders import FULL, a_run, not_writable
from models import build, samples

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.steps.execute import execute_checkpoints

PATTERN = "out/checkpoint-*"


def checkpoints(*more: str, pattern: str | None = PATTERN, **changes: str | None) -> list[str]:
    """A profile of checkpoints that works, with some options changed."""
    return [*profile(**{"model": None, "refusals": None, "checkpoints": pattern} | changes), *more]


def saved(here, _patch):
    """Three checkpoints of the model."""
    for step in (0, 5, 10):
        shutil.copytree(here / "model", here / f"out/checkpoint-{step}")


def half_done(here, patch):
    """A run that was stopped before its last step."""
    saved(here, patch)
    kept = here.with_name("half_done")  # made once, and the same folder for all tests
    if not kept.exists():
        given = {"forget": "forget.jsonl", "retain": "retain.jsonl", "objectives": "ga"}
        given |= {"checkpoints": [PATTERN], "resolve": ["group"], "norms": False}
        execute_checkpoints(make_config(given), here / "run")
        (here / "run/results.nc").unlink()
        (here / "run/steps/step-00000010.nc").unlink()
        (here / "run").rename(kept)
    shutil.copytree(kept, here / "run")


def also(name, change=lambda folder: None):
    """One folder more, a copy of the model."""

    def apply(here, patch):
        saved(here, patch)
        shutil.copytree(here / "model", here / name)
        change(here / name)

    return apply


def narrower(here, patch):
    """A model of another width among the checkpoints."""
    from geffect_fast.demo import Size, make_model, save
    from geffect_fast.measure.models import load_tokenizer

    saved(here, patch)
    shutil.rmtree(here / "out/checkpoint-5")
    tokenizer = load_tokenizer(here / "model")
    save(make_model(tokenizer, Size(hidden=8, n_layers=3)), tokenizer, here / "out/checkpoint-5")


def step_of_another_run(here, patch):
    half_done(here, patch)
    shutil.copy(here / "run/steps/step-00000005.nc", here / "run/steps/step-00000010.nc")


RESUMED = ["profile", "--quiet", "--out", "run", "--resume"]

# ---- from Python ----

DATA = {"forget": samples([4]), "retain": samples([4])}


def profiled(pattern=PATTERN, **changes):
    def call(here):
        given = DATA | {"objectives": "ga"} | changes
        gf.profile_checkpoints(
            [here / p for p in pattern] if isinstance(pattern, tuple) else pattern, None, **given
        )

    return call


def watched(sets=DATA, every=2, model=lambda: build("llama"), **changes):
    """A Trainer with the callback, which refuses before anything is trained."""

    def call(here):
        from transformers import Trainer, TrainingArguments

        given = {"objectives": "ga"} | changes
        probe = gf.integrations.GEffectCallback(sets, every, **given)
        arguments = TrainingArguments(
            str(here), use_cpu=True, report_to="none", max_steps=2, disable_tqdm=True
        )
        Trainer(model(), arguments, train_dataset=samples([4, 4]), callbacks=[probe]).train()

    return call


def sharded():
    model = build("llama")
    model.lm_head.weight.ds_id = 7
    return model


def nan():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    return model


CASES = [
    # ---- the choice of checkpoints ----
    Case(
        "no checkpoint matches",
        checkpoints(pattern="out/chekpoint-*"),
        "no folder matches out/chekpoint-*",
        "give a pattern such as 'out/checkpoint-*'",
        saved,
    ),
    Case(
        "checkpoints that are files",
        checkpoints(pattern="*.jsonl"),
        "--checkpoints: no folder matches *.jsonl",
        "give a pattern",
    ),
    Case(
        "two checkpoints of one step",
        [*checkpoints(), "--checkpoints", "other/*"],
        "other/step-5 are both of step 5",
        "leave one out",
        also("other/step-5"),
    ),
    Case(
        "a model and a checkpoint of step 0",
        checkpoints(model="model"),
        "checkpoint-0 is of step 0, and so is the model",
        "leave one out",
        saved,
    ),
    Case(
        "a checkpoint without a number",
        checkpoints(pattern="out/*"),
        "out/last: neither its name ends in a number",
        "rename it",
        also("out/last"),
    ),
    Case(
        "a checkpoint with half a state",
        checkpoints(pattern="out/*"),
        "out/last: neither its name ends",
        "trainer_state.json with a global_step",
        both(also("out/last"), holds("out/last/trainer_state.json", '{"global_step": ')),
    ),
    Case(
        "no data for checkpoints",
        checkpoints(forget=None),
        "--forget is missing",
        "give it",
        saved,
    ),
    Case(
        "an empty list of checkpoints",
        profiled(()),
        "checkpoints: the list is empty",
        "give a pattern",
    ),
    Case(
        "a model on the hub before checkpoints",
        profiled(("out/checkpoint-5",), model="org/model"),
        "model org/model",
        "give a folder",
        saved,
    ),
    Case(
        "a sweep of checkpoints",
        ["sweep", "--quiet", "--config", "sweep.yaml", "--out", "run"],
        "checkpoints: go with profile, not with sweep",
        "leave them out",
        both(
            saved,
            holds(
                "sweep.yaml",
                "command: sweep\nmodel: model\nforget: forget.jsonl\nretain: retain.jsonl\n"
                f"objectives: ['wga(1:2:2)']\ncheckpoints: ['{PATTERN}']\n",
            ),
        ),
    ),
    # ---- the content of checkpoints ----
    Case(
        "a folder that is no model",
        checkpoints(),
        "out/checkpoint-5: no config.json",
        "give a folder saved by save_pretrained",
        both(saved, gone("out/checkpoint-5/config.json")),
    ),
    Case(
        "the first checkpoint without weights",
        checkpoints(),
        "out/checkpoint-0: no weights",
        "save it again with save_pretrained",
        both(saved, gone("out/checkpoint-0/model.safetensors")),
    ),
    Case(
        "a checkpoint without a tokenizer",
        checkpoints(),
        "out/checkpoint-0: no tokenizer files",
        "--tokenizer",
        both(saved, gone("out/checkpoint-0/tok*")),
    ),
    # The first step is written before the error, and stays. The call from Python has no folder.
    Case(
        "a later checkpoint without weights",
        profiled(("out/checkpoint-0", "out/checkpoint-5")),
        "out/checkpoint-5: no weights",
        "save it again with save_pretrained",
        both(saved, gone("out/checkpoint-5/model.safetensors")),
    ),
    Case(
        "a later checkpoint that is cut off",
        profiled(("out/checkpoint-0", "out/checkpoint-5")),
        "out/checkpoint-5: its weights are truncated",
        "save it again with save_pretrained",
        both(saved, cut("out/checkpoint-5/model.safetensors", 5000)),
    ),
    Case(
        "a checkpoint of another architecture",
        profiled(("out/checkpoint-0", "out/checkpoint-5")),
        "out/checkpoint-5 has [320, 8] as model.embed_tokens.weight",
        "it is of another architecture; profile it apart",
        narrower,
    ),
    Case(
        "a checkpoint with another setting",
        profiled(("out/checkpoint-0", "out/checkpoint-5")),
        "rms_norm_eps of its config is 0.1",
        "profile models that differ in more than weights apart",
        both(saved, settings("out/checkpoint-5/config.json", rms_norm_eps=0.1)),
    ),
    Case(
        "a later checkpoint with NaN",
        profiled(("out/checkpoint-0", "out/checkpoint-5")),
        "out/checkpoint-5: model.norm.weight holds 1 NaN",
        "save the model again",
        both(saved, weight("model.norm.weight", float("nan"), "out/checkpoint-5")),
    ),
    # ---- resuming a run ----
    Case(
        "nothing to go on with",
        checkpoints("--resume"),
        "run folder run holds no run to resume",
        "leave out --resume",
        saved,
    ),
    Case(
        "a run of checkpoints that stopped",
        checkpoints(),
        "run folder run already holds run.yaml",
        "go on with --resume",
        half_done,
    ),
    Case(
        "going on with a run and replacing it",
        checkpoints("--resume", "--overwrite"),
        "--resume goes on with a run that --overwrite would remove",
        "give only one of them",
        half_done,
    ),
    Case(
        "going on with other objectives",
        checkpoints("--resume", objectives="npo", resolve="group"),
        "resume: objectives is ('npo',), and the run in",
        "begin another run in another --out",
        half_done,
    ),
    Case(
        "going on with a profile of one model",
        [*profile(), "--resume"],
        "--resume goes with --checkpoints",
        "leave it out",
    ),
    Case(
        "going on with a run that is complete",
        checkpoints("--resume"),
        "run folder run is complete",
        "choose another --out or use --overwrite",
        both(saved, a_run),
    ),
    Case(
        "what a run that stopped has found",
        ["show", "run"],
        "run folder run holds no results.nc: its run did not finish",
        "go on with --resume",
        half_done,
    ),
    Case(
        "a folder of steps that no run made",
        checkpoints(),
        "run folder run holds steps/notes.txt",
        "choose another --out",
        both(saved, holds("run/steps/notes.txt", "mine")),
    ),
    Case(
        "a torn step file",
        RESUMED,
        "step-00000005.nc is torn or not NetCDF",
        "Step 5 needs that name: move the file away",
        both(half_done, cut("run/steps/step-00000005.nc", 3000)),
    ),
    Case(
        "a foreign step file",
        RESUMED,
        "step-00000010.nc is torn or not NetCDF",
        "Step 10 needs that name: move the file away",
        both(half_done, holds("run/steps/step-00000010.nc", "mine")),
    ),
    Case(
        "a step file under another name",
        RESUMED,
        "step-00000010.nc holds step 5; it is left alone",
        "Step 10 needs that name: move the file away",
        step_of_another_run,
    ),
    Case(
        "steps of other data",
        RESUMED,
        "resume: the rows of forget are other tokens than when the run in",
        "bring back what it was",
        both(
            half_done,
            gone("run/manifest.json"),
            lambda here, _: shutil.copy(here / "retain.jsonl", here / "forget.jsonl"),
        ),
    ),
    Case(
        "a checkpoint that was replaced after it was measured",
        RESUMED,
        "resume: model.safetensors of --checkpoints",
        "put that back, or begin another run",
        both(half_done, weight("lm_head.weight", 0.5, "out/checkpoint-5")),
    ),
    Case(
        "a checkpoint to come that was replaced",
        RESUMED,
        "resume: model.safetensors of --checkpoints",
        "put that back, or begin another run",
        both(half_done, weight("lm_head.weight", 0.5, "out/checkpoint-10")),
    ),
    Case(
        "data that were replaced",
        RESUMED,
        "resume: forget.jsonl of --forget is not what the run",
        "put that back, or begin another run",
        both(half_done, lambda here, _: shutil.copy(here / "retain.jsonl", here / "forget.jsonl")),
    ),
    # ---- the disk ----
    Case(
        "a disk that is full at the first step",
        checkpoints(),
        "run/steps cannot be written: No space left",
        "free some space",
        both(saved, patched("geffect_fast.storage.step_store.synced", FULL)),
    ),
    Case(
        "a disk that is full at a later step",
        RESUMED,
        "step 10 cannot be written",
        "steps 0 to 5 are kept: free some space, and go on with --resume",
        both(half_done, patched("os.fsync", FULL)),
        code=3,
    ),
    Case(
        "Ctrl-C between checkpoints",
        RESUMED,
        "interrupted; what was measured to step 5 is kept",
        "go on with --resume --out",
        both(half_done, patched("geffect_fast.steps.probe.Probe.measure_at", KeyboardInterrupt())),
        code=130,
    ),
    Case(
        "a folder for checkpoints' profiles that cannot be written to",
        checkpoints(out="shut/run"),
        "shut is not writable",
        "choose another --out",
        both(saved, not_writable),
    ),
    # ---- the callback ----
    Case(
        "a callback without retain data",
        watched({"forget": samples([4])}),
        "probe_sets: there is no 'retain'",
        "give one of that name",
    ),
    Case(
        "a callback with a misspelt set",
        watched({"forgot": samples([4]), "retain": samples([4])}),
        "probe_sets: there is no 'forget'",
        "did you mean that by 'forgot'?",
    ),
    Case(
        "a callback with a list of sets",
        watched([samples([4])]),
        "probe_sets: got list",
        "give a dict with forget and retain",
    ),
    Case(
        "a callback with a taken name",
        watched(DATA | {"unlearn": samples([4])}),
        "probes: the name 'unlearn' is taken",
        "choose another",
    ),
    Case("a callback that never probes", watched(every=0), "every: must be", "at least 1, got 0"),
    Case("a callback with half a step", watched(every=2.5), "every: must be", "got 2.5"),
    Case(
        "a callback with an unknown objective",
        watched(objectives=["npq"]),
        "unknown objective 'npq'",
        "did you mean",
    ),
    Case(
        "a callback told of another trained objective",
        watched(trained="npo"),
        "trained: 'npo' is not among the objectives measured: ga",
        "add it",
    ),
    Case(
        "a callback whose folder holds a run",
        lambda here: watched(out=here / "run")(here),
        "already holds results.nc",
        "choose another",
        a_run,
    ),
    Case(
        "a callback whose folder is a file",
        lambda here: watched(out=here / "forget.jsonl")(here),
        "forget.jsonl is a file",
        "choose another",
    ),
    Case(
        "a callback for a model on many devices",
        watched(model=sharded),
        "its parameters are spread over devices",
        "use geffect_fast.profile_checkpoints",
    ),
    Case("a callback for a broken model", watched(model=nan), "lm_head.weight", "save the model"),
]

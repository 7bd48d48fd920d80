"""Random arguments and files of a user: a documented exit code, and no traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time

import pytest
from bad_input.folders import a_run
from step_results import step_dataset
from test_streams import closed_pipe

from geffect_fast.cli import COMMANDS, main
from geffect_fast.storage.results_file import save_result

pytestmark = pytest.mark.usefixtures("undrawn")

SECONDS = float(os.environ.get("GEFFECT_FAST_FUZZ_SECONDS", "2"))
"""Seconds for each kind and seed. The seed decides the inputs, the machine how many of them."""

SEEDS = [int(seed) for seed in os.environ.get("GEFFECT_FAST_FUZZ_SEEDS", "1,2").split(",")]

WORDS = [
    *(
        "",
        " ",
        "-",
        "--",
        "0",
        "-1",
        "1e999",
        "nan",
        "ga",
        "ga,",
        "npo(beta=)",
        "((",
        "a=b",
        "=",
        ",",
    ),
    *("run", "steps", "one", "model", "reference", "forget.jsonl", "retain.jsonl", "refusals.txt"),
    *(".", "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "run/results.nc", "run/run.yaml"),
    *(
        "no/such",
        "x" * 300,
        "\udcff",
        "ü\u202e",
        "~nobody",
        "[red]",
        "$x$",
        "{}",
        "*",
        "sample,token",
    ),
]
OPTIONS = [
    *("--model", "--forget", "--retain", "--objectives", "--objective", "--probe", "--refusals"),
    *("--reference", "--tokenizer", "--reduction", "--risk", "--resolve", "--group", "--engine"),
    *("--template", "--max-length", "--token-budget", "--dtype", "--device", "--threads", "--data"),
    *("--steps", "--lr", "--trainer", "--out", "--config", "--resume", "--overwrite", "--quiet"),
    *("--samples", "--rows", "--by", "--html", "--to", "--removal", "--retain-budget", "--norms"),
]
MADE_FROM = "--model model --forget forget.jsonl --retain retain.jsonl"
GOOD = {
    "profile": f"{MADE_FROM} --objectives ga --out new",
    "sweep": f"{MADE_FROM} --objectives ga --out new",
    "check": "--model model --data forget.jsonl --samples 1",
    "show": "run",
    "tokens": "run",
    "report": "run --out page.html",
    "export": "run --to t.csv",
    "weights": "run --out w.jsonl --retain-budget 0",
    "compare": "steps one --out new",
    "unlearn": f"{MADE_FROM} --objective ga --steps 1",
    "demo": "--out new --seed 1",
}


@pytest.fixture(scope="module")
def source(study, tmp_path_factory):
    folder = shutil.copytree(study, tmp_path_factory.mktemp("fuzz") / "here")
    a_run(folder, None)
    for seed, name in enumerate(("steps", "one")):
        (folder / name).mkdir()
        save_result(step_dataset(n_steps=3, seed=seed), folder / name / "results.nc")
    return folder


@pytest.fixture
def here(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # It would train for minutes, which is too long here.
    monkeypatch.setattr("geffect_fast.demo.memorise", interrupted)
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(source, tmp_path / "here", dirs_exist_ok=True)


def interrupted(*_args, **_kwargs):
    raise KeyboardInterrupt


def try_all(drawn, rng, capfd, least):
    """Run drawn cases until the time is up, some of them with a closed pipe as output."""
    until = time.monotonic() + SECONDS
    for n, (words, what) in enumerate(drawn, start=1):
        lost = [name for name in ("stdout", "stderr") if rng.random() < 0.1]
        with pytest.MonkeyPatch.context() as patch:
            for name in lost:
                patch.setattr(sys, name, closed_pipe(buffering=True))
            code = main(words)
        error = capfd.readouterr().err
        assert code in (0, 2, 3, 130, *([141] if lost else [])), (words, what, error[-2000:])
        assert "Traceback" not in error, (words, what, error)
        assert error.count("error: ") == (code not in (0, 141) and "stderr" not in lost), error
        if n >= least and time.monotonic() > until:
            return


def arguments(rng):
    """Commands that work, with words put in, taken out and replaced; and words alone."""
    commands = [command.__name__ for command in COMMANDS]
    while True:
        command = rng.choice(commands)
        words = GOOD.get(command, "").split() if rng.random() < 0.7 else []
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(words) + 1)
            new = [rng.choice(OPTIONS)] if rng.random() < 0.5 else []
            new += [rng.choice(WORDS)] if rng.random() < 0.7 else []
            words[at : at + rng.randrange(2)] = new
        if "unlearn" in (command, *words) and "--steps" in words:
            words += ["--template", "{answer}{question}"]  # nothing is trained
        yield [command, *words], None


@pytest.mark.parametrize("seed", SEEDS)
def test_arguments(here, seed, capfd, monkeypatch):
    monkeypatch.chdir(here)
    rng = random.Random(seed)
    try_all(arguments(rng), rng, capfd, 40)


AGAIN = f"profile {MADE_FROM} --objectives ga -q --template x --out run --overwrite".split()
FILES = {
    "forget.jsonl": [GOOD["check"].split(), ["weights", *GOOD["weights"].split()]],
    "retain.jsonl": [f"profile {GOOD['profile']} --max-length 1".split()],
    "run/manifest.json": [["show", "run"], ["report", "run"], AGAIN],
    "run/.replaced-1/note.json": [["show", "run"], ["report", "run"], AGAIN],
    "run/.replaced-1/aside/summary.csv": [["show", "run"]],
    "run/.next/run.yaml": [["profile", "-q", "--resume", "--out", "run"]],
    "run/steps/step-00000000.nc": [AGAIN, ["profile", "-q", "--resume", "--out", "run"]],
    "refusals.txt": [f"{GOOD['check']} --objectives po --refusals refusals.txt".split()],
    "run/results.nc": [["show", "run"], ["export", "run", "--to", "t.csv"]],
    "steps/results.nc": [["show", "steps"], ["compare", "steps", "one", "--out", "c"]],
    "run/run.yaml": [["profile", "--config", "run/run.yaml", "--template", "x", "--out", "new"]],
    "model/config.json": [GOOD["check"].split()],
    "model/tokenizer.json": [GOOD["check"].split()],
    "model/tokenizer_config.json": [GOOD["check"].split()],
    "model/model.safetensors": [GOOD["check"].split()],
}


def damaged(rng, data):
    """A file cut, with bytes replaced, doubled, or with a word of JSON in place of another."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return (
            data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40))) + data[at:]
        )
    if kind == 2:
        end = at + rng.randrange(1, 200)
        return data[:at] + bytes(len(data[at:end])) + data[end:]
    if kind == 3:
        return data + data[at:]
    word = rng.choice(["null", "[]", "{}", "-1", "1e999", '"x"', "true", "\\u0000", "\ud7ff"])
    return data[:at] + json.dumps(word).encode() + data[at + rng.randrange(9) :]


def files(rng, here):
    """Commands that work, on a file that is damaged, missing, or of another kind."""
    while True:
        name = rng.choice(list(FILES))
        file = here / name
        kept = shutil.copytree(here, here.with_name("kept"), symlinks=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes() if file.exists() else (here / "run/run.yaml").read_bytes()
        data = damaged(rng, data)
        file.unlink(missing_ok=True)
        kind = rng.random()
        if kind < 0.8:
            file.write_bytes(data)
        elif kind < 0.87:
            file.mkdir()
        elif kind < 0.94:
            file.symlink_to(rng.choice([file.name, "/", "nowhere", "../forget.jsonl"]))
        yield rng.choice(FILES[name]), (name, kind, data[:200])
        for each in here.iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        shutil.copytree(kept, here, dirs_exist_ok=True, symlinks=True)
        shutil.rmtree(kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_files(here, seed, capfd, monkeypatch):
    monkeypatch.chdir(here)
    rng = random.Random(seed)
    try_all(files(rng, here), rng, capfd, 20)

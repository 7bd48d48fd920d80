"""A run records its inputs, and a model in a run folder is the one that the run wrote."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path

import pytest
from bad_input.case import profile
from step_results import step_dataset
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.storage.inputs import input_sums, summed_beside
from geffect_fast.storage.manifest import Manifest, checksums, files_below
from geffect_fast.storage.results_file import save_result
from geffect_fast.storage.save_run import save_run

pytestmark = pytest.mark.usefixtures("undrawn")

CONFIG = make_config({"model": "a/b", "forget": "c/d", "retain": "e/f", "objectives": "ga"})


def made(command):
    words = [command, *profile(reference="reference", objectives="npo")[1:]]
    if command == "sweep":
        words[words.index("npo")] = "npo(beta=0.1:1:2)"
    return [*words, "--probe", "more=retain.jsonl"]


@pytest.mark.parametrize(
    ("command", "more"),
    [("profile", []), ("profile", ["--resolve", "sample,token"]), ("sweep", [])],
)
def test_a_run_holds_checksums_of_all_it_was_made_from(here, command, more):
    assert main([*made(command), *more]) == 0
    inputs = Manifest.read(here / "run").inputs
    assert inputs["--forget"] == checksums(here, ["forget.jsonl"])
    assert inputs["--probe more"] == checksums(here, ["retain.jsonl"])
    for option in ("--model", "--reference"):
        names = {"model.safetensors", "config.json", "tokenizer.json"}
        assert names <= {*inputs[option]}
        assert inputs[option] == checksums(here / option.removeprefix("--"), inputs[option])


REPLACED = {
    "profile": [("--model", "model/model.safetensors", "reference/model.safetensors")],
    "sweep": [
        ("--reference", "reference/model.safetensors", "model/model.safetensors"),
        ("--forget", "forget.jsonl", None),
        ("--probe more", "retain.jsonl", None),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", REPLACED)
def test_a_replay_names_what_was_replaced(here, capfd, command):
    assert main(made(command)) == 0
    again = [command, "--config", "run/run.yaml", "--quiet", "--overwrite", "--out"]
    assert main([*again, "same"]) == 0
    assert "no replay" not in capfd.readouterr().err
    shutil.copy(here / "forget.jsonl", here / "data.jsonl")
    meant = {"--forget": "data.jsonl", "--model": "reference", "--reference": "model"}
    for option, name, by in REPLACED[command]:
        before = (here / name).read_bytes()
        # the same rows, other bytes
        (here / name).write_bytes(before + b"\n" if by is None else (here / by).read_bytes())
        assert main([*again, "other"]) == 0
        # The message names the first in the manifest; the retain data are a probe here too.
        named = "--retain" if name == "retain.jsonl" else option
        line = f"{name.rpartition('/')[2]} of {named} is not what the run in {here / 'run'} was"
        assert f"warning: {line} made from, so this is no replay\n" in capfd.readouterr().err
        # An option that replaces the input is meant to name another one.
        if option in meant:
            assert main([*again, "meant", option, meant[option]]) == 0
            assert "no replay" not in capfd.readouterr().err
        (here / name).write_bytes(before)


def test_a_run_of_an_earlier_version_replays_without_a_word(here, capfd):
    assert main(made("profile")) == 0
    held = Manifest.read(here / "run")
    Manifest(held.files).write(here / "run")
    shutil.copy(here / "reference/model.safetensors", here / "model/model.safetensors")
    assert main(["profile", "--config", "run/run.yaml", "-q", "--out", "new"]) == 0
    assert "is not what the run" not in capfd.readouterr().err


def test_a_comparison_knows_its_runs(here):
    for seed, name in enumerate(("a", "b")):
        (here / name).mkdir()
        save_result(step_dataset(n_steps=3, seed=seed), here / name / "results.nc")
    assert main(["compare", "a", "b", "--out", "both", "-q"]) == 0
    assert Manifest.read(here / "both").inputs == {
        name: checksums(here / name, ["results.nc"]) for name in ("a", "b")
    }


def test_a_file_that_goes_while_it_is_read_is_named(here, monkeypatch):
    monkeypatch.setattr("geffect_fast.storage.inputs.checksums", lambda *a: Path("gone").stat())
    with pytest.raises(InputError, match=r"--model model cannot be read: No such file"):
        input_sums({"--model": "model"})


def test_sums_that_nobody_wants_any_more_are_not_waited_for(here):
    """The sums of a model of hundreds of GB take minutes, and Ctrl-C must not wait for them."""
    size = 40 * 2**30
    with Path("model/more.bin").open("wb") as file:
        file.truncate(size)  # no bytes on the disk; reading them takes 40 s at least
    waited = threading.Event()
    with pytest.raises(KeyboardInterrupt), summed_beside({"--model": "model"}):
        waited.wait(0.2)
        raise KeyboardInterrupt
    # No sum goes on: the block waits for its threads.
    assert not [t for t in threading.enumerate() if t.name.startswith("inputs")]


# ---- models in run folders ----


@pytest.fixture(scope="module")
def with_model(study, tmp_path_factory):
    """The study and a run with a model in it, as unlearn writes."""
    here = shutil.copytree(study, tmp_path_factory.mktemp("with_model") / "here")
    save_run(here / "run", make_dataset(resolve=()), CONFIG)
    shutil.copytree(here / "model", here / "run/model")
    held = Manifest.read(here / "run")
    Manifest(checksums(here / "run", {*held.files, *model_files(here)})).write(here / "run")
    return here


@pytest.fixture
def run(with_model, tmp_path, monkeypatch):
    """A copy of that run: `run` in the working folder."""
    monkeypatch.chdir(shutil.copytree(with_model, tmp_path / "here"))
    return tmp_path / "here/run"


def model_files(here):
    return [f"model/{name}" for name in files_below(here / "run/model")]


NAMES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


DAMAGES = ("flipped", "missing", "longer")


@pytest.mark.parametrize(
    ("option", "name", "damage"),
    [
        *itertools.product(["--model"], [*NAMES, "tokenizer_config.json"], DAMAGES),
        *zip(["--reference"] * 3, NAMES[1:], DAMAGES, strict=True),
    ],
)
def test_a_damaged_model_of_a_run_is_named(run, capfd, option, name, damage):
    file = run / "model" / name
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "longer":
        file.write_bytes(data + b" ")
    words = profile(out="new", objectives="npo") + ([] if option == "--model" else ["--reference"])
    words += ["run/model"] if option == "--reference" else []
    if option == "--model":
        words[words.index("model")] = "run/model"
    assert main(words) == 2
    line = capfd.readouterr().err
    said = f"error: {option.removeprefix('--')} {run / 'model'}: {name} is "
    assert line.startswith(said) and line.count("\n") == 1
    assert "move the folder out of its run to use it as it is" in line
    shutil.move(run / "model", run.parent / "moved")
    if damage == "longer" and name != "model.safetensors":
        load_model(run.parent / "moved")


def test_a_whole_model_of_a_run_is_loaded(run, tmp_path):
    (tmp_path / "link").symlink_to(run / "model")
    for folder in (run / "model", tmp_path / "link"):
        load_model(folder)
        load_tokenizer(folder)
    data = bytearray((run / "model/tokenizer.json").read_bytes())
    data[-3] ^= 1
    (run / "model/tokenizer.json").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path / "link")


@pytest.mark.parametrize("content", ['{"name": "app"}', "", "[" * 100_000, "\0"])
def test_a_manifest_of_another_program_beside_a_model_says_nothing(here, content):
    (here / "manifest.json").write_text(content)
    load_model(here / "model")


def test_a_damaged_manifest_of_a_run_is_named(run):
    (run / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is not as a run wrote it"):
        load_model(run / "model")

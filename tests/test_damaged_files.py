"""Files with any content that a command reads: one line, or no effect at all."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import h5py
import pytest
from bad_input.case import profile
from bad_input.folders import a_run
from report_views import text_of
from step_results import step_dataset
from synthetic import make_dataset

from geffect_fast.cli import main
from geffect_fast.cli.printing import print_result
from geffect_fast.errors import InputError
from geffect_fast.report.summary.runs import write_comparison
from geffect_fast.report.tables.compare import render_comparison
from geffect_fast.results.form import check_complete
from geffect_fast.steps.compare import compare
from geffect_fast.storage.disk import REPLACED
from geffect_fast.storage.results_file import save_result
from geffect_fast.storage.seal import write_sealed
from geffect_fast.training.resume import MARK, checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

CONTENTS = {
    "empty": b"",
    "truncated": b'{"names": ["a", "b',
    "0xff": b"\xff" * 40,
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "closed lists": b"[" * 100_000 + b"]" * 100_000,
    "a huge number": b"1" * 100_000,
    "huge numbers": b'{"names": ' + b"9" * 100_000 + b', "step": 1e999, "global_step": 1e999}',
    "null": b"null",
    "a list": b"[]",
    "a number": b"1",
    "a text": b'"text"',
    "nothing in it": b"{}",
    "numbers for names": b'{"names": [1], "present": 2, "folders": null, "source": []}',
    "NUL": b"\0" * 20,
    "lines": b"\n\n\n",
    "an alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 107)
    )
    + b"objectives: *j\n",
}
MADE_FROM = "--forget forget.jsonl --retain retain.jsonl --objectives ga -q --out new"
CHECK = "check --model model --data forget.jsonl --samples 1"
READ_BY = {
    "note": "show run",
    "run/manifest.json": "show run",
    "run/results.nc": "show run",
    "steps/results.nc": "compare steps one --out new",
    "run/run.yaml": f"profile --config run/run.yaml {MADE_FROM}",
    "alone.yaml": "profile --config alone.yaml --out new",
    "forget.jsonl": CHECK,
    "refusals.txt": f"{CHECK} --objectives po --refusals refusals.txt",
    "model/config.json": CHECK,
    "model/generation_config.json": CHECK,
    "model/tokenizer.json": CHECK,
    "model/tokenizer_config.json": CHECK,
    "model/special_tokens_map.json": CHECK,
    "model/chat_template.jinja": CHECK,
    "model/model.safetensors": CHECK,
    "model/model.safetensors.index.json": CHECK,
    "model/adapter_config.json": CHECK,
    "trained/trainer_state.json": f"profile --checkpoints trained {MADE_FROM}",
}


SHORT = ("refusals.txt", "run/run.yaml")
"""Files whose beginning is enough. Any text is a refusal, and a long one takes long; `run/run.yaml`
is read as `alone.yaml` is."""

STEPS = [step_dataset(n_steps=3, seed=seed, weights=False) for seed in (0, 1)]


@pytest.fixture(scope="module")
def study(study, tmp_path_factory):
    """The study with a run, a training, and results of steps."""
    folder = shutil.copytree(study, tmp_path_factory.mktemp("whole") / "here")
    a_run(folder, None)
    shutil.copytree(folder / "model", folder / "trained")
    for made, name in zip(STEPS, ("steps", "one"), strict=True):
        (folder / name).mkdir()
        save_result(made, folder / name / "results.nc")
    return folder


@pytest.mark.parametrize("name", READ_BY)
def test_every_file_that_is_read_may_hold_anything(here, name, capfd):
    file = here / name
    if name == "note":
        (here / f"run/{REPLACED}1/aside").mkdir(parents=True)
        (here / f"run/{REPLACED}1/aside/summary.csv").write_text("mine")
        file = here / f"run/{REPLACED}1/note.json"
    if name == "model/model.safetensors.index.json":
        (here / "model/model.safetensors").unlink()
    for kind, content in CONTENTS.items():
        file.write_bytes(content[: 300 if name in SHORT else None])
        code = main(READ_BY[name].split())
        error = capfd.readouterr().err
        assert code in (0, 2), (name, kind, error[-2000:])
        line = error.splitlines()[-1] if error else ""
        assert code == 0 or (line.startswith("error: ") and "error: unexpected" not in line), (
            kind,
            error,
        )
        assert len(line) < 700 and "Traceback" not in error, (kind, error)
        if name == "note":
            assert f"holds {REPLACED}1, an earlier run" in line, kind
            assert "is missing or damaged" in line, kind
            assert (here / f"run/{REPLACED}1/aside/summary.csv").read_text() == "mine"
        if name.startswith(("run/", "steps/")) and name != "run/run.yaml":
            assert code == 2 and name.rpartition("/")[2] in line, (kind, error)
        shutil.rmtree(here / "new", ignore_errors=True)


SEALED = {
    "nothing": {},
    "no inputs": {"files": {}},
    "files in a list": {"files": [], "inputs": {}},
    "inputs in a list": {"files": {}, "inputs": []},
    "an input in a list": {"files": {}, "inputs": {"--model": []}},
    "sums that are none": {"files": {"results.nc": 1}, "inputs": {}},
    "sizes in words": {"files": {"results.nc": {"bytes": "1", "sha256": "x"}}, "inputs": {}},
    "sums by number": {"files": {"results.nc": {"bytes": 1, "sha256": 1}}, "inputs": {}},
    "a name with NUL": {"files": {"a\0b": {"bytes": 1, "sha256": "x"}}, "inputs": {}},
    "a name that is too long": {"files": {"x" * 5000: {"bytes": 1, "sha256": "x"}}, "inputs": {}},
}


@pytest.mark.parametrize("kind", SEALED)
def test_a_manifest_that_was_sealed_by_somebody_else_may_hold_anything(here, kind, capfd):
    write_sealed(here / "run/manifest.json", SEALED[kind])
    for words in (["show", "run"], [*profile(), "--overwrite"], ["report", "run"]):
        code = main(words)
        line = capfd.readouterr().err
        assert code in (0, 2) and "error: unexpected" not in line, (words, line)


@pytest.mark.parametrize("step", ["one", 1e999, None, [1], 10**400])
def test_a_mark_of_a_checkpoint_may_hold_anything(tmp_path, step):
    (tmp_path / "checkpoint-1").mkdir()
    mark = tmp_path / "checkpoint-1" / MARK
    for held in ({"identity": "x", "step": step}, {"identity": 1, "step": 1}, {"step": step}):
        mark.write_text(json.dumps(held))
        found = checkpoints(tmp_path)
        assert found == ({} if held.get("identity") != "x" or step != 10**400 else found)
    for content in CONTENTS.values():
        mark.write_bytes(content)
        assert checkpoints(tmp_path) == {}


ODD = [*("[" * 100_000, "null", '{"a": 1}', "", "1" * 10_000), 1.5]


@pytest.mark.parametrize("steps", [False, True])
def test_every_attribute_of_a_result_may_hold_anything(steps, tmp_path):
    """The result is in memory, as after `open_run`, beside a sound one where there are steps."""
    made = STEPS[0] if steps else make_dataset(n_blocks=1)
    for name in made.attrs:
        for value in ODD:
            odd = made.assign_attrs({name: value})
            with suppress(InputError):
                if steps:
                    aligned = compare({"steps": odd, "one": STEPS[1]})
                    write_comparison(aligned, tmp_path)
                    text_of(render_comparison(aligned))
                else:
                    check_complete(odd, "run")
                    print_result(odd, tmp_path)


@pytest.mark.parametrize("words", ["show steps", "compare steps one --out new"])
def test_attributes_are_read_from_a_file_whatever_they_hold(here, words, capfd):
    """The attributes are one that results have, and the one that says how they are written."""
    whole, file = here / "whole.nc", here / "steps/results.nc"
    STEPS[0].assign_attrs(json_attrs="[]").to_netcdf(whole, engine="h5netcdf")
    for name in ("objectives", "json_attrs") if words.startswith("show") else ("versions",):
        for value in ODD:
            shutil.copy(whole, file)
            with h5py.File(file, "r+", libver="latest") as opened:
                opened.attrs[name] = value
            code = main(words.split())
            error = capfd.readouterr().err
            assert code in (0, 2) and "error: unexpected" not in error, (name, value, error)
            shutil.rmtree(here / "new", ignore_errors=True)

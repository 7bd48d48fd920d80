"""The command line: what it does, and that bad input costs one line, exit code 2 and no file."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from geffect_fast.cli import main
from geffect_fast.runs.store import open_run

OBJECTIVES = "ga,wga(alpha=1),npo(beta=0.1)+kl,dpo,rmu(layer=1)"


@pytest.fixture
def here(study, tmp_path, monkeypatch):
    """A copy of the study as the working folder."""
    folder = shutil.copytree(study, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def arguments(**changes):
    options = {
        "model": "model",
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "refusals": "refusals.txt",
        "objectives": OBJECTIVES,
        "out": "run",
    } | changes
    pairs = [(f"--{key.replace('_', '-')}", value) for key, value in options.items()]
    return ["profile", *(word for pair in pairs if pair[1] is not None for word in pair)]


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """A finished run over everything that options offer."""
    out = tmp_path_factory.mktemp("finished") / "run"
    files = {
        "model": "model",
        "reference": "reference",
        "forget": "forget.jsonl",
        "retain": "retain.jsonl",
        "refusals": "refusals.txt",
    }
    words = arguments(
        **{name: str(study / file) for name, file in files.items()},
        probe=f"general={study / 'general.jsonl'}",
        threads="1",
        out=str(out),
    )
    assert main([*words, "--quiet"]) == 0
    return out


def snapshot(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


# ---- what works ----


def test_a_run_folder_is_complete(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "plots",
        "results.nc",
        "run.yaml",
        "summary.csv",
    ]
    assert sorted(p.name for p in (finished / "plots").iterdir()) == ["instances.png", "layers.png"]
    dataset = open_run(finished)
    assert list(dataset.risk.values) == ["unlearn", "retain", "general"]
    assert list(dataset.objective.values)[:3] == ["ga", "wga(alpha=1)", "npo(beta=0.1) + kl"]
    assert np.isfinite(dataset.g_effect).all() and (dataset.g_effect != 0).any()
    assert list(pd.read_csv(finished / "summary.csv").objective) == list(dataset.objective.values)


def test_run_yaml_replays_to_the_same_bits_from_elsewhere(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        words = ["profile", "--config", str(finished / "run.yaml"), "--out", "again", "-q"]
        assert main(words) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    first, again = open_run(finished), open_run(tmp_path / "again")
    assert set(first.data_vars) == set(again.data_vars)
    for name in first.data_vars:
        assert first[name].values.tobytes() == again[name].values.tobytes(), name
    replay = (tmp_path / "again" / "run.yaml").read_text()
    assert replay == (finished / "run.yaml").read_text()
    assert "threads: 1" in replay and "token_budget: null" not in replay


def test_options_override_the_config(finished, tmp_path):
    words = [
        "profile",
        "--config",
        str(finished / "run.yaml"),
        "--out",
        str(tmp_path / "run"),
        "-q",
    ]
    assert main([*words, "--objectives", "gd", "--no-norms", "--resolve", "sample"]) == 0
    dataset = open_run(tmp_path / "run")
    assert list(dataset.objective.values) == ["gd"]
    assert dataset.g_effect.dims == ("objective", "risk", "sample") and "cosine" not in dataset


def test_a_loud_run_prints_tables_paths_and_findings(here, capsys):
    assert main(arguments(objectives="ga,po")) == 0
    printed = capsys.readouterr()
    for words in ("verdict", "Where e_u comes from", "run/plots/layers.png", "Read the signs so"):
        assert words in printed.out
    assert main(["show", "run"]) == 0
    again = capsys.readouterr().out
    assert again in printed.out and "verdict" in again


def test_overwrite_replaces_a_run(here):
    assert main([*arguments(objectives="ga"), "-q"]) == 0
    assert main([*arguments(objectives="po"), "-q", "--overwrite"]) == 0
    assert list(open_run(here / "run").objective.values) == ["po"]


def test_a_model_without_files_for_a_tokenizer_takes_tokenised_data(here):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 3
    for name in ("forget", "retain"):
        (here / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for file in (here / "model").glob("tokenizer*"):
        file.unlink()
    assert main([*arguments(objectives="ga", refusals=None), "-q"]) == 0


def test_export(finished, tmp_path, capsys):
    for name in ("all.csv", "all.parquet"):
        assert main(["export", str(finished), "--to", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name)
    assert len(pd.read_parquet(tmp_path / "all.parquet")) == open_run(finished).g_effect.size


def test_env_names_every_op_and_its_provider(capsys):
    from geffect_fast.ops import providers

    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"torch         {torch.__version__.split('+')[0]}" in printed
    for row in providers():
        line = next(line for line in printed.splitlines() if line.startswith(row.op))
        assert row.provider in line and row.reason in line


CHECK = ["check", "--model", "model", "--data", "forget.jsonl", "--samples", "2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_check_prints_a_table_and_a_verdict(here, capsys, dtype):
    before = snapshot(here)
    words = [*CHECK, "--objective", "ga,dpo", "--refusals", "refusals.txt", "--dtype", dtype]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for word in ("ga, dpo on 2 samples", "post_attention_layernorm", "embedding", "Layout: packed"):
        assert word in printed
    assert "Covered: 30 of 30 trainable parameters, 22,640 of 22,640 elements." in printed
    assert "Exact: all 30 trainable parameters agree with plain autograd" in printed
    assert main([*words, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out.startswith("Exact: ") and quiet.out.count("\n") == 1 and quiet.err == ""
    assert snapshot(here) == before


def test_a_deviation_exits_with_3(here, capsys, monkeypatch):
    from geffect_fast.capture.calls import NormCall

    normalized = NormCall.normalized
    monkeypatch.setattr(NormCall, "normalized", lambda call: 1.01 * normalized(call))
    assert main(CHECK) == 3
    printed = capsys.readouterr()
    assert "Deviation: input_layernorm (captured by norm): " in printed.out and printed.err == ""
    assert main([*CHECK, "-q"]) == 3


def test_a_model_that_a_check_cannot_serve_is_one_line(here, capsys, monkeypatch):
    """A weight read from outside its module."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self, x):
        return torch.nn.functional.linear(x, self.up_proj.weight) @ self.up_proj.weight

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert main(CHECK) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "error: parameter 'model.layers.0.mlp.up_proj.weight'" in printed.err


@pytest.mark.parametrize("command", ["profile", "check", "show", "export", "demo", "env"])
def test_every_command_explains_itself_and_its_exit_codes(command, capsys):
    assert main([command, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 all went well; 2 bad input" in printed
    assert "3 check found a deviation" in printed


def test_without_a_command_there_is_help_and_a_version(capsys):
    assert main([]) == 0
    assert "profile" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("geffect-fast ")


# ---- what is refused ----


def corrupt(file, line, text):
    lines = file.read_text().splitlines()
    lines[line - 1] = text
    file.write_text("\n".join(lines) + "\n")


def row(**fields):
    return json.dumps({"question": "Who?", "answer": "She."} | fields)


def poison(here, name="model"):
    from geffect_fast.runs.models import load_model, quiet_transformers

    model = load_model(here / name)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    with quiet_transformers():
        model.save_pretrained(here / name)


def shrink(file, size):
    file.write_bytes(file.read_bytes()[:size])


def set_config(here, **values):
    (here / "my.yaml").write_text(json.dumps(values))


BAD = {
    "forget file missing": (
        None,
        {"forget": "no/such/file.jsonl"},
        ["forget", "no/such/file.jsonl", "does not exist"],
    ),
    "retain file missing": (
        None,
        {"retain": "none.json"},
        ["retain", "none.json", "does not exist"],
    ),
    "probe file missing": (None, {"probe": "p=none.json"}, ["p", "none.json", "does not exist"]),
    "probe without name": (None, {"probe": "none.json"}, ["--probe", "NAME=DATA"]),
    "malformed line": (
        lambda here: corrupt(here / "forget.jsonl", 3, '{"question": '),
        {},
        ["forget", "line 3", "forget.jsonl", "malformed JSON"],
    ),
    "question missing": (
        lambda here: corrupt(here / "retain.jsonl", 2, '{"answer": "a"}'),
        {},
        ["retain", "line 2", "question"],
    ),
    "answer missing": (
        lambda here: corrupt(here / "forget.jsonl", 1, '{"question": "q"}'),
        {},
        ["forget", "line 1", "answer"],
    ),
    "question empty": (
        lambda here: corrupt(here / "forget.jsonl", 2, row(question=" ")),
        {},
        ["line 2", "'question' is empty"],
    ),
    "answer empty": (
        lambda here: corrupt(here / "forget.jsonl", 4, row(answer="")),
        {},
        ["line 4", "'answer' is empty"],
    ),
    "answer no text": (
        lambda here: corrupt(here / "forget.jsonl", 4, row(answer=7)),
        {},
        ["line 4", "'answer' is of type int"],
    ),
    "empty data set": (
        lambda here: (here / "forget.jsonl").write_text("\n"),
        {},
        ["forget", "no rows"],
    ),
    "unknown objective": (None, {"objectives": "ga,nppo"}, ["'nppo'", "did you mean 'npo'"]),
    "unknown parameter": (None, {"objectives": "wga(alfa=1)"}, ["wga", "'alfa'", "'alpha'"]),
    "parameter out of range": (None, {"objectives": "npo(beta=-2)"}, ["npo", "beta", "-2"]),
    "objective twice": (None, {"objectives": "ga,ga"}, ["ga", "twice"]),
    "objectives empty": (None, {"objectives": ""}, ["objectives", "empty"]),
    "refusals missing": (None, {"refusals": None}, ["dpo", "--refusals"]),
    "refusals file missing": (
        None,
        {"refusals": "no.txt"},
        ["refusals", "no.txt", "does not exist"],
    ),
    "refusals empty": (
        lambda here: (here / "refusals.txt").write_text(""),
        {},
        ["refusals", "none"],
    ),
    "reference missing": (None, {"reference": "./gone"}, ["reference", "./gone", "does not exist"]),
    "reference not finite": (
        lambda here: poison(here, "reference"),
        {"reference": "reference"},
        ["reference", "layers.1.self_attn.k_proj.weight", "infinite"],
    ),
    "model missing": (None, {"model": "./gone"}, ["model", "./gone", "does not exist"]),
    "model neither folder nor on the hub": (
        None,
        {"model": "gone"},
        ["model gone", "no such folder"],
    ),
    "model without config": (
        lambda here: (here / "model" / "config.json").unlink(),
        {},
        ["no config.json"],
    ),
    "model truncated": (
        lambda here: shrink(here / "model" / "model.safetensors", 4000),
        {},
        ["truncated or broken"],
    ),
    "model without weights": (
        lambda here: (here / "model" / "model.safetensors").unlink(),
        {},
        ["no weights"],
    ),
    "model not finite": (poison, {}, ["layers.1.self_attn.k_proj.weight", "infinite"]),
    "tokenizer missing": (
        lambda here: [f.unlink() for f in (here / "model").glob("tokenizer*")],
        {},
        ["no tokenizer files"],
    ),
    "sample too long": (None, {"max_length": "5"}, ["row 0", "max_length=5"]),
    "bad choice": (None, {"reduction": "mean"}, ["reduction", "'mean'"]),
    "bad number": (None, {"threads": "many"}, ["--threads", "integer"]),
    "bad template": (None, {"template": "{question}"}, ["template", "{answer}"]),
    "device not here": (None, {"device": "cuda:9"}, ["cuda:9", "is not here"]),
    "no model": (None, {"model": None}, ["--model is missing"]),
    "unknown option": (None, {"objektives": "ga"}, ["--objektives"]),
    "config missing": (None, {"config": "gone.yaml"}, ["gone.yaml", "does not exist"]),
    "config with unknown field": (
        lambda here: set_config(here, reductionn="sum"),
        {"config": "my.yaml"},
        ["my.yaml", "'reductionn'", "'reduction'"],
    ),
    "out is a file": (None, {"out": "forget.jsonl"}, ["forget.jsonl", "is a file"]),
    "out holds results": (
        lambda here: [(here / "run").mkdir(), (here / "run" / "results.nc").touch()],
        {},
        ["run", "already holds results.nc", "--overwrite"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_written(here, capsys, case):
    prepare, changes, words = BAD[case]
    if prepare is not None:
        prepare(here)
    before = snapshot(here)
    assert main([*arguments(**changes), "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    for word in words:
        assert word in printed.err
    assert snapshot(here) == before


def test_a_refused_out_folder_costs_no_work(here, capsys, monkeypatch):
    (here / "run").mkdir()
    (here / "run" / "results.nc").touch()
    monkeypatch.setattr("geffect_fast.runs.execute.load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr("geffect_fast.runs.execute.read_rows", lambda *a, **k: pytest.fail("read"))
    assert main(arguments()) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["show", "gone"],
        ["export", "gone", "--to", "x.csv"],
        ["export"],
        ["profil"],
        ["demo", "--seed", "x"],
        ["check"],
        ["check", "--model", "model"],
        ["check", "--model", "gone/away/far", "--data", "forget.jsonl"],
        ["check", "--model", "model", "--data", "gone.jsonl"],
        [*CHECK, "--samples", "0"],
        [*CHECK, "--objectives", "gaa"],
        [*CHECK, "--objectives", "po"],
        [*CHECK, "--objectives", "kl"],
        [*CHECK, "--dtype", "float31"],
        [*CHECK, "--device", "cuda:9"],
        [*CHECK, "--reference", "./gone"],
        [*CHECK, "--max-length", "5"],
    ],
    ids=" ".join,
)
def test_other_commands_refuse_likewise(here, capsys, words):
    before = snapshot(here)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert snapshot(here) == before


def test_an_export_to_a_strange_file_is_refused(finished, tmp_path, capsys):
    assert main(["export", str(finished), "--to", str(tmp_path / "all.xlsx")]) == 2
    assert ".parquet or .csv" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_unexpected_failure_shows_where_and_exits_with_1(here, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr("geffect_fast.runs.execute.profile", fail)
    assert main([*arguments(), "-q"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("error: unexpected RuntimeError: a wheel came off\n")
    assert not (here / "run").exists()


def test_an_interrupt_exits_with_130_and_leaves_nothing(here, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("geffect_fast.report.plots.plot_instances", interrupt)
    assert main([*arguments(objectives="ga"), "-q"]) == 130
    assert not (here / "run").exists()


def test_the_exit_code_reaches_the_shell(tmp_path):
    words = [sys.executable, "-m", "geffect_fast.cli", "show", str(tmp_path / "gone")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

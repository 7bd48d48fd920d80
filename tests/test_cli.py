"""The command line: successful commands; refusals are in `bad_input`."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from geffect_fast.cli import main
from geffect_fast.storage.run_folder import open_run

pytestmark = pytest.mark.usefixtures("undrawn")

OBJECTIVES = "ga,wga(alpha=1),npo(beta=0.1)+kl,dpo,rmu(layer=1)"
FOUND = "data: 4 rows of questions and answers (JSON lines)\n"


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
def finished(study, tmp_path_factory, undrawn):
    """A finished run with all kinds of options."""
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
    with undrawn():
        assert main([*words, "--quiet"]) == 0
    return out


def snapshot(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


# ---- success ----


def test_a_run_folder_is_complete(finished):
    assert sorted(p.name for p in finished.iterdir()) == [
        "manifest.json",
        "plots",
        "report.html",
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


@pytest.mark.usefixtures("drawn")
def test_a_loud_run_prints_tables_paths_and_findings(here, capsys):
    assert main(arguments(objectives="ga,po")) == 0
    printed = capsys.readouterr()
    for words in (
        "verdict",
        "Where e_u comes from",
        "run/plots/layers.png",
        "How to read the signs",
    ):
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
    from geffect_fast.capture.layer_rules import NormCall

    sums = NormCall.sums
    monkeypatch.setattr(NormCall, "sums", lambda *given: 1.01 * sums(*given))
    assert main(CHECK) == 3
    printed = capsys.readouterr()
    assert "Deviation: input_layernorm (captured by norm): " in printed.out
    assert printed.err == FOUND
    assert main([*CHECK, "-q"]) == 3


@pytest.mark.parametrize(
    "command",
    ["profile", "sweep", "check", "show", "tokens", "weights", "export", "demo", "env"],
)
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


# ---- failure ----


def test_a_refused_out_folder_costs_no_work(here, capsys, monkeypatch):
    (here / "run").mkdir()
    (here / "run" / "results.nc").touch()
    monkeypatch.setattr(
        "geffect_fast.measure.by_config.load_model", lambda *a: pytest.fail("loaded")
    )
    monkeypatch.setattr(
        "geffect_fast.measure.sources.read_rows", lambda *a, **k: pytest.fail("read")
    )
    assert main(arguments()) == 2


def test_an_unexpected_failure_shows_where_and_exits_with_1(here, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr("geffect_fast.measure.execute.profile", fail)
    assert main([*arguments(), "-q"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("error: unexpected RuntimeError: a wheel came off\n")
    assert not (here / "run").exists()


def test_the_exit_code_reaches_the_shell(tmp_path):
    words = [sys.executable, "-m", "geffect_fast.cli", "show", str(tmp_path / "gone")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

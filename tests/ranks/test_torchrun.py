"""Commands that torchrun starts: one folder, one output, one line for an error."""

import os
import subprocess
import sys

import pytest

import geffect_fast as gf
from geffect_fast.measure.models import load_model

pytestmark = pytest.mark.slow


def torchrun(size, *words):
    """A command on several ranks."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command = [sys.executable, "-m", "geffect_fast", *map(str, words)]
    return subprocess.run(
        [*launch, "--nproc-per-node", str(size), *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.fixture(scope="module")
def given(study):
    named = ("--model", study / "model", "--forget", study / "forget.jsonl")
    return *named, "--retain", study / "retain.jsonl", "--objectives", "ga", "wga"


def test_two_ranks_write_what_one_process_writes(given, tmp_path, capsys):
    from geffect_fast.cli import main

    words = ("profile", *given, "--resolve", "sample,token", "--out")
    assert main([*map(str, words), str(tmp_path / "alone")]) == 0
    alone = capsys.readouterr().out
    ended = torchrun(2, *words, tmp_path / "ranks")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == alone.replace("alone", "ranks")
    with gf.open_run(tmp_path / "alone") as one, gf.open_run(tmp_path / "ranks") as other:
        assert abs(one.g_effect - other.g_effect).max() <= 1e-6 * abs(one.g_effect).max()
        assert one.attrs["digests"] == other.attrs["digests"]
    assert sorted(f.name for f in (tmp_path / "alone").iterdir()) == sorted(
        f.name for f in (tmp_path / "ranks").iterdir()
    )


def test_two_ranks_train_as_one_process_does(study, tmp_path, capsys):
    """accelerate sees torchrun's processes, yet each of them trains by itself."""
    from geffect_fast.cli import main

    words = ("unlearn", "--model", study / "model", "--forget", study / "forget.jsonl")
    words += ("--retain", study / "retain.jsonl", "--objective", "npo + kl", "--steps", "2")
    words += ("--learning-rate", "1e-3", "--batch-size", "3", "--probe-rows", "2")
    words += ("--probe-every", "2", "--no-second-order")
    words += ("--report-to", "tensorboard", "--out")
    assert main([*map(str, words), str(tmp_path / "alone")]) == 0
    alone = capsys.readouterr().out
    ended = torchrun(2, *words, tmp_path / "ranks")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == alone.replace("alone", "ranks")
    one, other = (load_model(tmp_path / name / "model") for name in ("alone", "ranks"))
    before = load_model(study / "model")
    for name, p in one.named_parameters():
        apart = float((p - other.get_parameter(name)).abs().max())
        assert apart <= 1e-3 * float((p - before.get_parameter(name)).abs().max()), name
    names = [
        sorted(
            str(f.relative_to(tmp_path / run)).split(".out.")[0]
            for f in (tmp_path / run).rglob("*")
        )
        for run in ("alone", "ranks")
    ]
    assert [name for name in names[0] if "logs/" not in name] == [
        name for name in names[1] if "logs/" not in name
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["weights", "--out", "run"], "weights runs in one process; start it without torchrun"),
        # found on every rank, in the middle of its batches
        (
            ["profile", "--objectives", "rmu", "--out", "run"],
            "objective rmu: layer must be at least",
        ),
    ],
)
def test_one_line_says_what_is_wrong(given, words, said, tmp_path):
    command, *more = words
    ended = torchrun(2, command, *given, *more)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode != 0
    assert len(lines) == 1
    assert said in lines[0]
    assert ended.stderr.count("Traceback") == 1  # torchrun's own
    assert "[rank" not in ended.stderr

"""What `relearn`, `control` and the survey say on several ranks is what one process says."""

import os
import shutil

import pytest
from ranked import on_ranks

import geffect_fast as gf
from geffect_fast import report
from geffect_fast.cli import main

pytestmark = pytest.mark.slow

DATA = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", "--quiet"]
RELEARN = "relearn --model ga/model --forget forget.jsonl --steps 3 --rows 2 --learning-rate 0.01"
CONTROL = "control --original model --unlearned ga/model --metric probability --grid 4"
SURVEY = "evaluate --model ga/model --suite survey --holdout general.jsonl --relearn steps=3"
COMMANDS = {
    "relearn": [*RELEARN.split(), "--measure-every", "1", "--quiet"],
    "control": [*CONTROL.split(), "--tolerance", "0.1", "--save", "mixed-SIZE", *DATA],
    "survey": [*SURVEY.split(), "--relearn", "n_rows=2", "--relearn", "learning_rate=0.01", *DATA],
}


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """A study whose model was unlearned."""
    folder = shutil.copytree(study, tmp_path_factory.mktemp("neighbours") / "here")
    words = ["unlearn", "--model", "model", *DATA, "--objective", "ga", "--steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*words, "--lr", "0.01", "--out", "ga"]) == 0
    return folder


def commanded(folder, size):
    """The exit codes of all commands on this rank."""
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_, **__: None)
        return [
            main([word.replace("SIZE", str(size)) for word in [*words, "--out", f"{name}-{size}"]])
            for name, words in COMMANDS.items()
        ]


def test_ranks_say_what_one_process_says(folder):
    assert commanded(folder, 1) == [0] * 3
    assert on_ranks(2, commanded, folder, 2) == [[0] * 3] * 2
    for name in COMMANDS:
        one, other = (gf.open_evaluation(folder / f"{name}-{size}") for size in (1, 2))
        assert set(one.data_vars) == set(other.data_vars)
        for variable, values in one.data_vars.items():
            if values.dtype.kind == "f" and variable not in ("seconds", "peak_memory"):
                apart = abs(other[variable] - values).max()
                assert not apart > 1e-5 * abs(values).max(), (name, variable)
                assert (other[variable].isnull() == values.isnull()).all(), (name, variable)
    saved = [
        sorted(f.name for f in (folder / f"mixed-{size}").rglob("*") if f.is_file())
        for size in (1, 2)
    ]
    assert saved[0] == saved[1]

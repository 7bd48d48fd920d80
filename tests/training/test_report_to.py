"""`unlearn --report-to`: reporters get every probe once, TensorBoard writes to the folder."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from events import Listener, expected, of_probes, scalars
from interrupted import interrupted_at
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
)

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.errors import InterruptedRunError, UnfinishedError
from geffect_fast.measure.profiler import Profiler
from geffect_fast.storage.run_yaml import load_config
from geffect_fast.training import logs
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import Training, UnlearnConfig


@pytest.fixture
def config(study, monkeypatch):
    """A run that reports to TensorBoard, and to a listener in W&B's place."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(Listener, "heard", [])
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Listener)
    return checked_config(
        UnlearnConfig,
        {
            **{name: str(study / f"{name}.jsonl") for name in ("forget", "retain")},
            **{"model": str(study / "model"), "probes": {"general": str(study / "general.jsonl")}},
            **{"objective": "npo(beta=0.1) + kl", "objectives": ["ga"], "resolve": ["sample"]},
            **{"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "save_every": 2, "threads": 1},
            "report_to": "tensorboard, wandb",
        },
    )


def events(folder):
    return of_probes(scalars(folder / "logs"))


def test_every_reporter_gets_what_the_result_says(config, tmp_path):
    folder = tmp_path / "run"
    config = config.model_copy(update={"steps": 2})
    result = execute_unlearn(config, folder)
    found = events(folder)
    assert found == expected(result, "npo(beta=0.1) + kl")
    assert {"e_u", "e_r", "e_general", "collateral", "e_u/ga", "risk_general"} <= found.keys()
    heard = {step: logs for step, logs in Listener.heard if "geffect/e_u" in logs}
    assert list(heard) == [0, 1, 2]
    effect = result.g_effect.sum("sample").sel(objective="ga", risk="retain")
    assert [logs["geffect/e_r/ga"] for logs in heard.values()] == effect.values.tolist()
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    written = [path.name for path in (folder / "logs").iterdir()]
    assert [name for name in listed if name.startswith("logs/")] == [f"logs/{n}" for n in written]
    assert load_config(folder / "run.yaml").report_to == ("tensorboard", "wandb")
    # Reporting changes no number: a run without it has the same, and one that replaces it succeeds.
    quiet = config.model_copy(update={"report_to": ()})
    again = execute_unlearn(quiet, folder, overwrite=True)
    assert again.drop_attrs(deep=False).identical(result.drop_attrs(deep=False))
    assert not (folder / "logs").exists()


def test_a_run_that_is_gone_on_with_shows_every_step_once(config, tmp_path):
    """The run stops after step 3 with a checkpoint of step 2, so that step 3 is trained again."""
    folder = tmp_path / "run"
    with interrupted_at(4), pytest.raises(InterruptedRunError):
        execute_unlearn(config, folder)
    assert [step for step, _ in events(folder)["e_u"]] == [0, 1, 2, 3]
    result = execute_unlearn(config, folder, resume=True)
    assert events(folder) == expected(result, "npo(beta=0.1) + kl")


def test_a_disk_that_is_full_at_the_logs_costs_a_line(config, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", Mock(side_effect=full))
        with pytest.raises(UnfinishedError, match="logs of report_to cannot be written: No space"):
            execute_unlearn(config, tmp_path / "run")
    result = execute_unlearn(
        config.model_copy(update={"report_to": ("tensorboard",)}), tmp_path / "run", resume=True
    )
    assert events(tmp_path / "run") == expected(result, "npo(beta=0.1) + kl")


def test_logs_of_one_second_are_shown_in_their_order(tmp_path, monkeypatch):
    """TensorBoard reads logs by name; the last part of the name counts without leading zeros."""
    clock = [1.0e9]
    fake = SimpleNamespace(
        time=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + s)
    )
    for module in (event_file_writer, logs):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(event_file_writer, "_global_uid", AtomicCounter(9))
    for done in (None, 1):
        callback = TensorBoardCallback()
        trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[callback]))
        with logs.logged(tmp_path, trainer, done):
            callback.tb_writer.add_text("args", "{}")
            for step in (1, 2) if done is None else (2, 3):
                callback.tb_writer.add_scalar("loss", step, step)
    assert scalars(tmp_path / "logs") == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_a_run_that_fails_before_its_first_probe_leaves_nothing(config, tmp_path, monkeypatch):
    def fails(*_args, **_more):
        raise gf.errors.InputError("no")

    monkeypatch.setattr(Profiler, "measure", fails)
    with pytest.raises(gf.errors.InputError):
        execute_unlearn(config, tmp_path / "run")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("given", [["tensorboard"], "tensorboard,none", "tensorboard"])
def test_a_field_of_training_arguments_is_the_same_setting(given):
    training = Training(steps=1, trainer={"report_to": given, "weight_decay": 0.1})
    assert training.report_to == ("tensorboard",) and training.trainer == {"weight_decay": 0.1}
    assert Training(steps=1, trainer={"report_to": None}).report_to == ()

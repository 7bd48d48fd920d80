"""Reporters of an unlearning run (`report_to`), and TensorBoard's logs in the run's folder."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
)

from geffect_fast.errors import InputError, UnfinishedError, in_one_line
from geffect_fast.registry import nearest
from geffect_fast.storage.run_folder import LOG_SUFFIX, LOGS

if TYPE_CHECKING:
    from transformers import Trainer

ELSEWHERE = "TENSORBOARD_LOGGING_DIR"
"""Environment variable that names another folder, to which transformers then writes."""


def check_reporters(names: Iterable[str]) -> None:
    """Raise `InputError`, with its name, for a reporter that transformers cannot report to."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            advice = nearest(name, sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(f"report_to: unknown '{name}'; {advice}")
        if name == "tensorboard" and importlib.util.find_spec(name) is None:
            raise InputError(
                "report_to: tensorboard is not installed; pip install tensorboard, or leave it out"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # each reporter has its own error for a missing package
            raise InputError(
                f"report_to: {name} cannot be used: {in_one_line(error, 300)}; or leave it out"
            ) from None


@contextmanager
def logged(folder: Path | None, trainer: Trainer, done: int | None) -> Iterator[None]:
    """Write TensorBoard's events of a training to its run folder, the events of each step once.

    Args:
        folder: folder of the run; None: events go where transformers puts them.
        trainer: the trainer that is about to train.
        done: updates that are done already when a training resumes; what an earlier process logged
            of later updates is not shown. None: the training begins.

    Raises:
        UnfinishedError: the disk refuses.
    """
    place = None if folder is None or ELSEWHERE in os.environ else folder / LOGS
    writers = []
    try:
        for callback in trainer.callback_handler.callbacks:
            if place is not None and isinstance(callback, TensorBoardCallback):
                from torch.utils.tensorboard import SummaryWriter

                _wait_for_a_later_name(place)
                writer = SummaryWriter(
                    str(place),
                    purge_step=0 if done is None else done + 1,
                    filename_suffix=LOG_SUFFIX,
                )
                callback.tb_writer = writer
                writers.append(writer)
        yield
    except OSError as error:  # everything else that writes raises an error of its own
        raise UnfinishedError(
            f"logs of report_to cannot be written: {error.strerror or error}",
            remedy="free some space and go on with --resume, or with --resume --report-to none",
        ) from error
    finally:
        for writer in writers:
            with suppress(OSError):
                writer.close()  # otherwise its thread goes on writing


def _wait_for_a_later_name(logs: Path) -> None:
    """Wait for the next second where a log of this second exists.

    The name of a log begins with the second in which it was opened, and TensorBoard reads logs in
    the order of their names.
    """
    now = time.time()
    if any(logs.glob(f"events.out.tfevents.{int(now):010d}.*")):
        time.sleep(1 - now % 1)

"""Who is told of an unlearning run, `report_to`, and where TensorBoard finds it: in its folder."""

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
"""Where it is set, transformers writes there."""


def check_reporters(names: Iterable[str]) -> None:
    """Raise `InputError` where transformers cannot report to one of these: it is named."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            advice = nearest(name, tuple(sorted(INTEGRATION_TO_CALLBACK)))
            raise InputError(f"report_to: unknown '{name}'; {advice}")
        if name == "tensorboard" and importlib.util.find_spec(name) is None:
            raise InputError(
                "report_to: tensorboard is not installed; pip install tensorboard, or leave it out"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # each says in its own way that its package is missing
            raise InputError(
                f"report_to: {name} cannot be used: {in_one_line(error, 300)}; or leave it out"
            ) from None


@contextmanager
def logged(folder: Path | None, trainer: Trainer, done: int | None) -> Iterator[None]:
    """A training whose events for TensorBoard go to its run folder, those of every step once.

    Args:
        folder: of the run; None: they go where transformers puts them.
        trainer: that is about to train.
        done: updates that the training goes on behind: what an earlier process logged of later ones
            is not shown. None: it begins.

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
    except OSError as error:  # what else writes says so itself
        raise UnfinishedError(
            f"logs of report_to cannot be written: {error.strerror or error}; free some space and "
            "go on with --resume, or with --resume --report-to none"
        ) from error
    finally:
        for writer in writers:
            with suppress(OSError):
                writer.close()  # its thread would write on


def _wait_for_a_later_name(logs: Path) -> None:
    """Let a second begin of which no log is: names begin with it, and TensorBoard reads by name."""
    now = time.time()
    if any(logs.glob(f"events.out.tfevents.{int(now):010d}.*")):
        time.sleep(1 - now % 1)

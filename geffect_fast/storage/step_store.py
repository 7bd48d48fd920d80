"""The store of step results: one file for each step of a run, written as the steps are measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError, UnfinishedError
from geffect_fast.paths import user_path
from geffect_fast.ranks import ALONE, Ranks
from geffect_fast.storage.disk import folder_for, synced
from geffect_fast.storage.results_file import write_dataset
from geffect_fast.storage.run_folder import open_run

if TYPE_CHECKING:
    import xarray as xr

IDENTITY = "run_identity"
"""Attribute of a step file with the identity of its run."""

_STEP = re.compile(r"step-(\d{8,})\.nc")
_PART = re.compile(r"\.step-\d{8,}\.nc\.part")


class StepStore:
    """The results of a run's steps, each in a file of its own, or all in memory.

    A step's file is written under a hidden name and renamed once it is whole and on the disk; the
    file is never changed afterwards. Files that a killed process left half-written are removed. A
    file in the folder that is torn, or not of this run, is left alone and named in messages.

    Several ranks make and call a store together: the first rank writes, and all ranks read.

    Args:
        folder: made with the first step; None keeps the results in memory.
        identity: marks a file as one of this run, such as a hash of its config and data.
        ranks: the ranks that share the store.

    Attributes:
        left_alone: a line for each file in the folder that is no step of this run.

    Raises:
        InputError: the folder cannot be read.
    """

    def __init__(self, folder: str | Path | None, identity: str, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self.folder = None if folder is None else user_path(folder).absolute()
        self.identity = identity
        self._files: dict[int, Path] = {}
        self._held: dict[int, xr.Dataset] = {}
        self._taken: dict[str, str] = {}
        if ranks.first:
            self._look()
        self._files, self._taken = ranks.first_of((self._files, self._taken))

    @property
    def steps(self) -> list[int]:
        """Steps of this run that are complete, in order."""
        return sorted({*self._files, *self._held})

    @property
    def where(self) -> str:
        """The store's name in messages."""
        return "memory" if self.folder is None else f"steps folder {self.folder}"

    @property
    def left_alone(self) -> list[str]:
        return list(self._taken.values())

    def check_free(self, steps: Iterable[int]) -> None:
        """Raise `InputError` where another file has the name of a step that is to be written."""
        for step in steps:
            why = self._taken.get(_name(step))
            if why is not None:
                raise InputError(f"{why}. Step {step} needs that name: move the file away")

    def write(self, step: int, dataset: xr.Dataset) -> None:
        """Keep the result of a step.

        Args:
            step: not among `steps`.
            dataset: the result, without an axis `step`.

        Raises:
            InputError: the name is taken; or the disk refuses, and there is no earlier step.
            UnfinishedError: the disk refuses, and the earlier steps are kept.
        """
        self.check_free([step])
        if step in self.steps:
            raise ValueError(f"step {step} is there already")
        dataset = dataset.assign_coords(step=step).assign_attrs({IDENTITY: self.identity})
        if self.folder is None:
            self._held[step] = dataset
            return
        file = self.folder / _name(step)
        if self._ranks.first:
            self._write(step, dataset, file)
        self._ranks.meet()
        self._files[step] = file

    def _write(self, step: int, dataset: xr.Dataset, file: Path) -> None:
        assert self.folder is not None
        part = self.folder / f".{file.name}.part"
        try:
            with folder_for(self.where, self.folder):
                self._clean()
                try:
                    write_dataset(dataset, part)
                    synced(part)
                    part.rename(file)
                    synced(self.folder)
                except BaseException:
                    with suppress(OSError):
                        part.unlink(missing_ok=True)
                    raise
        except InputError as error:
            if not self.steps:
                raise
            raise UnfinishedError(
                f"step {step} cannot be written to {self.folder}: {error.__cause__}",
                remedy=f"steps {self.steps[0]} to {self.steps[-1]} are kept: free some space, and "
                "go on with --resume",
            ) from error

    def read(self, step: int) -> xr.Dataset:
        """The result of a step, with a scalar coordinate `step`.

        Raises:
            InputError: the file was damaged since the store was opened.
        """
        dataset = self._held[step] if step in self._held else open_run(self._files[step])
        kept = {key: value for key, value in dataset.attrs.items() if key != IDENTITY}
        return dataset.drop_attrs(deep=False).assign_attrs(kept)

    def combined(self) -> xr.Dataset:
        """All steps along a first axis `step`, with the attributes of the first step.

        Raises:
            InputError: there is no step, or a file was damaged.
        """
        import xarray as xr

        if not self.steps:
            raise InputError(f"{self.where} holds no step of this run; run it first")
        return xr.concat(
            [self.read(step) for step in self.steps],
            dim="step",
            data_vars="all",
            coords="minimal",
            compat="override",
            join="exact",
            combine_attrs="override",
        )

    def _look(self) -> None:
        """Find the steps that the folder holds, and the files that are none.

        Raises:
            InputError: the folder cannot be read.
        """
        try:
            files = sorted(self.folder.iterdir()) if self.folder and self.folder.exists() else []
        except OSError as error:
            raise InputError(
                f"{self.where} cannot be read: {error.strerror}; choose another --out"
            ) from None
        for file in files:
            problem = self._problem(file)
            if problem is not None:
                self._taken[file.name] = f"{file} {problem}; it is left alone"

    def _problem(self, file: Path) -> str | None:
        """The reason why a file in the folder is no step of this run; a step is noted as found.

        The value is None for a step, and for a half-written file, which may be removed.
        """
        named = _STEP.fullmatch(file.name)
        if named is None:
            return None if _PART.fullmatch(file.name) else "is no step file"
        if not file.is_file():
            return "is no file"
        try:
            dataset = open_run(file)
        except InputError as error:
            return error.problem.removeprefix(f"{file} ")
        if dataset.attrs.get(IDENTITY) != self.identity:
            return "is a step of another run"
        step = int(named[1])
        if dataset.coords["step"].item() != step:
            return f"holds step {dataset.coords['step'].item()}"
        self._files[step] = file
        return None

    def _clean(self) -> None:
        """Remove the files that a killed process left half-written."""
        assert self.folder is not None
        for file in self.folder.iterdir():
            if _PART.fullmatch(file.name):
                file.unlink()


def _name(step: int) -> str:
    return f"step-{step:08d}.nc"

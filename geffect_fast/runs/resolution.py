"""Which axes a result has, and what is written along them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.data import SampleSet, token_places
from geffect_fast.data.batch import Batch
from geffect_fast.data.tokenize import Sample
from geffect_fast.data.tokenize import Sequence as TokenSequence
from geffect_fast.engines.tasks import Task
from geffect_fast.errors import InputError
from geffect_fast.runs.axes import groups_of, parameter_coordinates

AXES = ("parameter", "group", "sample", "position")


@dataclass(frozen=True)
class Resolution:
    """The axes of a result beside `objective` and `risk`; all others are summed.

    Attributes:
        axes: of `AXES`, in that order.
        parameters: names of the trainable parameters.
        sets: the data sets on the sample axis, by name: forget, and retain where it is read.
        alternatives: whether the samples' alternatives are read too.
    """

    axes: tuple[str, ...]
    parameters: Sequence[str]
    sets: dict[str, SampleSet]
    alternatives: bool

    @property
    def by_place(self) -> str | None:
        """`parameter`, `group`, or None where the whole model is summed."""
        return next((axis for axis in ("parameter", "group") if axis in self.axes), None)

    @property
    def per_sample(self) -> bool:
        """Whether samples, or positions in them, have to be told apart."""
        return "sample" in self.axes or "position" in self.axes

    @property
    def dims(self) -> tuple[str, ...]:
        return ("objective", "risk", *self.axes)

    def columns(self) -> tuple[list[str], list[int]]:
        """Labels of parameters or groups, and for each parameter the number of its label."""
        if self.by_place == "parameter":
            return list(self.parameters), list(range(len(self.parameters)))
        if self.by_place == "group":
            return groups_of(self.parameters)
        return [""], [0] * len(self.parameters)

    def shape(self, n_objectives: int, n_risks: int) -> tuple[int, int, int, int, int]:
        """Objectives, risks, parameters or groups, samples, positions; 1 for what is summed."""
        samples = [sample for _, sample in self._samples()]
        return (
            n_objectives,
            n_risks,
            len(self.columns()[0]),
            len(samples) if "sample" in self.axes else 1,
            max(self._n_tokens(sample) for sample in samples) if "position" in self.axes else 1,
        )

    def kept(self, values: np.ndarray) -> np.ndarray:
        """An array of `shape` without the axes that were summed."""
        by_axis = dict(zip(("place", "sample", "position"), (2, 3, 4), strict=True))
        has = {axis: axis in self.axes for axis in ("sample", "position")}
        has["place"] = self.by_place is not None
        return values.squeeze(tuple(at for axis, at in by_axis.items() if not has[axis]))

    def places(self, task: Task, batch: Batch) -> Tensor:
        """As `geffect_fast.engines.effect_array.Places`."""
        return token_places(self.sets[task.on], batch)

    def coordinates(self, tokenizer: Any) -> dict[str, Any]:
        """Coordinates of all axes.

        Args:
            tokenizer: writes the tokens out along positions; None: their ids only.
        """
        coords: dict[str, Any] = {}
        if self.by_place == "parameter":
            coords |= parameter_coordinates(self.parameters)
        elif self.by_place == "group":
            coords["group"] = self.columns()[0]
        if "sample" in self.axes:
            samples = list(self._samples())
            coords["sample"] = np.array([sample.row for _, sample in samples])
            coords["set"] = ("sample", [name for name, _ in samples])
            coords["question"] = ("sample", [sample.question for _, sample in samples])
        if "position" in self.axes:
            coords |= self._positions(tokenizer)
        return coords

    def _positions(self, tokenizer: Any) -> dict[str, Any]:
        samples = [sample for _, sample in self._samples()]
        n_positions = max(map(self._n_tokens, samples))
        coords: dict[str, Any] = {"position": np.arange(n_positions)}
        if "sample" not in self.axes:
            return coords
        ids = np.full((len(samples), n_positions), -1, dtype=np.int32)
        sequence = ids.copy()
        for row, sample in enumerate(samples):
            several = self._sequences(sample)
            own = torch.cat([s.input_ids for s in several]).numpy()
            ids[row, : len(own)] = own
            sequence[row, : len(own)] = np.repeat(np.arange(len(several)), list(map(len, several)))
        coords["token_id"] = (("sample", "position"), ids)
        coords["sequence"] = (("sample", "position"), sequence)
        if tokenizer is not None:
            known, at = np.unique(ids, return_inverse=True)
            texts = ["" if token < 0 else tokenizer.decode([token]) for token in known.tolist()]
            coords["token"] = (
                ("sample", "position"),
                np.array(texts, dtype=object)[at].reshape(ids.shape),
            )
        return coords

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        for name, sample_set in self.sets.items():
            for sample in sample_set.samples:
                yield name, sample

    def _sequences(self, sample: Sample) -> list[TokenSequence]:
        return [sample.answer, *(sample.alternatives if self.alternatives else ())]

    def _n_tokens(self, sample: Sample) -> int:
        return sum(map(len, self._sequences(sample)))


def checked_axes(resolve: Sequence[str]) -> tuple[str, ...]:
    """The axes that are meant, in the order of `AXES`; raise `InputError` where there are none."""
    if not isinstance(resolve, Iterable):
        raise InputError(f"resolve: got {resolve!r}; choose from {', '.join(AXES)}")
    asked = (resolve,) if isinstance(resolve, str) else tuple(resolve)
    for axis in asked:
        if axis == "token":
            raise InputError(
                "resolve: 'token', which predicted token drives an effect, needs the forward "
                "engine, which is not here yet; 'position' says where in a sequence a layer is used"
            )
        if axis not in AXES:
            raise InputError(f"resolve: unknown axis '{axis}'; choose from {', '.join(AXES)}")
    if {"parameter", "group"} <= set(asked):
        raise InputError(
            "resolve: 'parameter' has its group beside it already; give 'parameter' or 'group'"
        )
    return tuple(axis for axis in AXES if axis in asked)

"""The axes of a result, their coordinates, and the array in which effects add up along them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geffect_fast.capture.segments import Offsets
from geffect_fast.data import IGNORE, SampleSet, token_places
from geffect_fast.data.batch import Batch
from geffect_fast.data.samples import Sample, TokenSequence
from geffect_fast.engines.batches import DataPass
from geffect_fast.errors import InputError
from geffect_fast.results.groups import Blocks, groups_of, parameter_coordinates

AXES = ("parameter", "group", "sample", "position", "token")
WITHIN = ("position", "token")
"""Axes within a sample, each of one engine: positions of a layer's use, and predicted tokens."""

PARAMETER, SAMPLE, WITHIN_SAMPLE = 2, 3, 4
"""Numbers of the axes after objectives and risks: parameters or groups, rows of all data sets,
positions or tokens. Arrays of effects have all five axes, of size 1 where they are summed."""


@dataclass(frozen=True)
class Resolution:
    """The axes of a result beside `objective` and `risk`; effects are summed over all others.

    Attributes:
        axes: those of `AXES` that the result has, in the order of `AXES`.
        parameters: names of the trainable parameters.
        sets: the data sets on the sample axis, by name: forget, and retain where it is read.
        alternatives: whether the samples' alternatives are read too.
        blocks: groups of blocks by name, as in `geffect_fast.results.groups.groups_of`; None for
            thirds.
    """

    axes: tuple[str, ...]
    parameters: Sequence[str]
    sets: dict[str, SampleSet]
    alternatives: bool
    blocks: Blocks | None = None

    @property
    def by_parameter_or_group(self) -> str | None:
        """The axis `parameter` or `group`; None where effects are summed over the whole model."""
        return next((axis for axis in ("parameter", "group") if axis in self.axes), None)

    @property
    def per_sample(self) -> bool:
        """Whether an engine must keep samples, or positions or tokens within them, apart."""
        return "sample" in self.axes or self.within is not None

    @property
    def within(self) -> str | None:
        """The axis `position` or `token`; None where effects are summed within samples."""
        return next((axis for axis in WITHIN if axis in self.axes), None)

    @property
    def set_names(self) -> list[str]:
        """The name of the data set of each row on the sample axis."""
        return [name for name, _ in self._samples()]

    @property
    def dims(self) -> tuple[str, ...]:
        return ("objective", "risk", *self.axes)

    def columns(self) -> tuple[list[str], list[int]]:
        """Labels of parameters or groups, and for each parameter the number of its label."""
        if self.by_parameter_or_group == "parameter":
            return list(self.parameters), list(range(len(self.parameters)))
        if self.by_parameter_or_group == "group":
            return groups_of(self.parameters, self.blocks)
        return [""], [0] * len(self.parameters)

    def shape(self, n_objectives: int, n_risks: int) -> tuple[int, int, int, int, int]:
        """Sizes of the axes: objectives, risks, parameters or groups, samples, positions or tokens.

        A summed axis has size 1.
        """
        every = [sample for _, sample in self._samples()]
        return (
            n_objectives,
            n_risks,
            len(self.columns()[0]),
            len(every) if "sample" in self.axes else 1,
            max(int(self._within(sample).numpy().max()) + 1 for sample in every)
            if self.within
            else 1,
        )

    def kept(self, values: np.ndarray) -> np.ndarray:
        """An array of `shape` without the axes that were summed."""
        has = {
            PARAMETER: self.by_parameter_or_group is not None,
            SAMPLE: "sample" in self.axes,
            WITHIN_SAMPLE: self.within is not None,
        }
        return values.squeeze(tuple(at for at, is_axis in has.items() if not is_axis))

    def indices_within(self, data_pass: DataPass, batch: Batch) -> Tensor:
        """The index of each token of a batch along the axis within samples.

        `(total_tokens,)` int64; -1 for a token that is not on the axis.
        """
        sample_set = self.sets[data_pass.on]
        by_row = {sample.row: sample for sample in sample_set.samples}
        stands = token_places(sample_set, batch)
        at = torch.full_like(stands, -1)
        for row, own in zip(batch.rows, Offsets.of(batch.sample_lengths), strict=True):
            known = stands[own] >= 0
            at[own][known] = self._within(by_row[row])[stands[own][known]]
        return at

    def coordinates(self, tokenizer: Any) -> dict[str, Any]:
        """Coordinates of all axes.

        Args:
            tokenizer: gives the text of tokens along the axis within samples; None for ids only.
        """
        coords: dict[str, Any] = {}
        if self.by_parameter_or_group == "parameter":
            coords |= parameter_coordinates(self.parameters, self.blocks)
        elif self.by_parameter_or_group == "group":
            coords["group"] = self.columns()[0]
        if "sample" in self.axes:
            every = list(self._samples())
            coords["sample"] = np.array([sample.data_row for _, sample in every])
            coords["set"] = ("sample", [name for name, _ in every])
            coords["question"] = ("sample", [stored_text(sample.question) for _, sample in every])
        if self.within is not None:
            coords |= self._within_coordinates(self.within, tokenizer)
        return coords

    def _within_coordinates(self, axis: str, tokenizer: Any) -> dict[str, Any]:
        every = [sample for _, sample in self._samples()]
        indices = [self._within(sample) for sample in every]
        n = 1 + max(int(own.numpy().max()) for own in indices)
        coords: dict[str, Any] = {axis: np.arange(n)}
        if "sample" not in self.axes:
            return coords
        ids = np.full((len(every), n), -1, dtype=np.int32)
        sequence = ids.copy()
        for row, (sample, own) in enumerate(zip(every, indices, strict=True)):
            several = self._sequences(sample)
            kept = own >= 0
            number = torch.repeat_interleave(torch.tensor([len(s) for s in several]))
            at = own[kept].numpy()  # as a tensor, a single index would act as a scalar
            ids[row, at] = torch.cat([s.input_ids for s in several])[kept].numpy()
            sequence[row, at] = number[kept].numpy()
        coords["token_id"] = (("sample", axis), ids)
        coords["sequence"] = (("sample", axis), sequence)
        if tokenizer is not None:
            known, at = np.unique(ids, return_inverse=True)
            texts = [
                "" if token < 0 else stored_text(tokenizer.decode([token]))
                for token in known.tolist()
            ]
            coords["token_text"] = (
                ("sample", axis),
                np.array(texts, dtype=object)[at].reshape(ids.shape),
            )
        return coords

    def _within(self, sample: Sample) -> Tensor:
        """The index on the axis of each token of a sample's sequences, one after the other.

        `(n_tokens,)` int64. The axis `position` counts all tokens, `token` those with a label; the
        others get -1.
        """
        labels = torch.cat([s.labels for s in self._sequences(sample)])
        counted = torch.ones_like(labels, dtype=torch.bool)
        if self.within == "token":
            counted = labels != IGNORE
        return torch.where(counted, counted.cumsum(0) - 1, -1)

    def _samples(self) -> Iterator[tuple[str, Sample]]:
        for name, sample_set in self.sets.items():
            for sample in sample_set.samples:
                yield name, sample

    def _sequences(self, sample: Sample) -> list[TokenSequence]:
        return [sample.answer, *(sample.alternatives if self.alternatives else ())]


class EffectArray:
    """Effects of objectives, added up from batches of the effects of their parts.

    Args:
        mixture: `(K, n_parts)` fp64, the coefficient of each part in each objective.
        values: fp64 zeros of `Resolution.shape`, added to in place: an array of numpy, or one in a
            file, of which one sample at a time is in memory.
        indices_within: `Resolution.indices_within`; None to sum over the tokens of a sample.
    """

    def __init__(
        self,
        mixture: Tensor,
        values: Any,
        indices_within: Callable[[DataPass, Batch], Tensor] | None = None,
    ) -> None:
        self.mixture = mixture
        self.values = values
        self.indices_within = indices_within

    def add(self, data_pass: DataPass, batch: Batch, effects: Tensor) -> None:
        """Add the effects of parts on one batch.

        Args:
            data_pass: the pass with the parts that read the batch.
            batch: the batch, with its samples.
            effects: `(len(data_pass.parts), M, C, n)` fp64 on the CPU, `n` the batch's samples or,
                with `indices_within`, its tokens.
        """
        mixed = torch.tensordot(self.mixture[:, list(data_pass.parts)], effects, dims=1)
        self.add_mixed(data_pass, batch, mixed)

    def add_mixed(self, data_pass: DataPass, batch: Batch, mixed: Tensor) -> None:
        """Add the effects of objectives, instead of parts, on one batch, `(K, M, C, n)`."""
        by_sample = self.values.shape[SAMPLE] > 1
        if self.indices_within is None:
            pieces = mixed.unbind(-1)
        else:
            indices = self.indices_within(data_pass, batch)
            own = Offsets.of(batch.sample_lengths)
            pieces = tuple(_by_index(mixed[..., tokens], indices[tokens]) for tokens in own)
        for row, piece in zip(batch.rows, pieces, strict=True):
            at = row + data_pass.offset if by_sample else 0
            found = piece.reshape(*piece.shape[:3], -1).numpy()
            self.values[:, :, :, at, : found.shape[-1]] += found

    def add_whole(self, columns: Sequence[int], effects: Tensor) -> None:
        """Add effects of whole data sets to a result without an axis of samples or within samples.

        Args:
            columns: for each parameter the number of its label.
            effects: `(n_parts, M, P)`, by parameter, on the CPU.
        """
        mixed = torch.tensordot(self.mixture, effects, dims=1)
        torch.from_numpy(self.values)[..., 0, 0].index_add_(PARAMETER, torch.tensor(columns), mixed)


def by_row(values: Any) -> np.ndarray:
    """`EffectArray.values` summed over all axes but objectives, risks and rows, `(K, M, n)`."""
    if isinstance(values, np.ndarray):
        return values.sum((PARAMETER, WITHIN_SAMPLE))
    rows = range(values.shape[SAMPLE])  # read from the file one at a time
    summed = (PARAMETER, PARAMETER + 1)  # the axes of a row
    return np.stack([values[:, :, :, row, :].sum(summed) for row in rows], axis=-1)


def _by_index(effects: Tensor, indices: Tensor) -> Tensor:
    """Effects `(..., n_tokens)` of one sample along the axis within samples, 0 without a token."""
    kept = indices >= 0
    found = effects.new_zeros(*effects.shape[:-1], int(indices.numpy().max()) + 1)
    found[..., indices[kept]] = effects[..., kept]
    return found


def stored_text(text: str) -> str:
    """A text in the form that results hold.

    NetCDF ends a text at U+0000, so the symbol for null replaces it. No file holds half a surrogate
    pair, so its escape replaces it.
    """
    return text.replace("\0", "\N{SYMBOL FOR NULL}").encode(errors="backslashreplace").decode()


def checked_axes(resolve: Sequence[str]) -> tuple[str, ...]:
    """The axes that `resolve` names, in the order of `AXES`.

    Raises:
        InputError: `resolve` is no sequence of names, has an unknown name, or names both
            `parameter` and `group`, or both `token` and `position`.
    """
    if not isinstance(resolve, Iterable):
        raise InputError(f"resolve: got {resolve!r}; choose from {', '.join(AXES)}")
    asked = (resolve,) if isinstance(resolve, str) else tuple(resolve)
    for axis in asked:
        if axis not in AXES:
            raise InputError(f"resolve: unknown axis '{axis}'; choose from {', '.join(AXES)}")
    if {"parameter", "group"} <= set(asked):
        raise InputError(
            "resolve: 'parameter' has its group beside it already; give 'parameter' or 'group'"
        )
    if set(WITHIN) <= set(asked):
        raise InputError(
            "resolve: 'token', which predicted token drives an effect, and 'position', where in a "
            "sequence a layer is used, are two profiles; give one of them"
        )
    return tuple(axis for axis in AXES if axis in asked)

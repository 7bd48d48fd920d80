"""The precision of a 16-bit model's effects, from the effects of two rows computed anew in fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.data import SampleSet
from geffect_fast.data.memory import free_memory
from geffect_fast.engines.batches import DataPass
from geffect_fast.engines.choice import Engine
from geffect_fast.engines.forward import parameter_passes_for
from geffect_fast.engines.reference import Reference
from geffect_fast.measure.effects import find_effects
from geffect_fast.results.axes import Resolution, by_row
from geffect_fast.results.intervals import NEGLIGIBLE

HALF = (torch.bfloat16, torch.float16)
MARGIN = 3
"""Factor on the error that is found: an effect is the product of two gradients that are rounded
alike, of which only one is computed anew, and two rows stand for all."""


@dataclass(frozen=True)
class RoundingCheck:
    """The check of a 16-bit model's precision, by two rows of every data set that objectives read.

    Attributes:
        engine: the profile's.
        passes: which parts of objectives read which batches of the two rows; the rows' shares are
            the same as in the whole data.
        mixture: `(K, n_parts)`, how often each part counts in each objective.
        whole: the profile's resolution.
        resolution: of the two rows, which are told apart where the profile can tell rows apart.
        rows: numbers of the two forget rows in their data.
    """

    engine: Engine
    passes: Sequence[DataPass]
    mixture: Tensor
    whole: Resolution
    resolution: Resolution
    rows: tuple[int, ...]

    @classmethod
    def of(
        cls,
        engine: Engine,
        resolution: Resolution,
        mixture: Tensor,
        passes_of: Callable[[Mapping[str, SampleSet]], Sequence[DataPass]],
    ) -> RoundingCheck:
        """Make the check for a profile of a 16-bit model.

        Args:
            engine, resolution, mixture: the profile's.
            passes_of: makes the passes over given data sets by name.
        """
        few = {name: each.part(two_rows(len(each))) for name, each in resolution.sets.items()}
        # Where only whole gradients are formed, there may be no way to tell samples apart.
        apart = engine == "forward" or resolution.per_sample
        axes = ("sample",) if apart else ("group",)
        passes = [
            replace(
                one,
                batches=[replace(b, totals=resolution.sets[one.on].totals()) for b in one.batches],
                # A row's number here is another row's number in the whole data.
                on=f"{one.on}, two rows",
            )
            for one in passes_of(few)
        ]
        return cls(
            engine,
            passes,
            mixture,
            resolution,
            Resolution(axes, resolution.parameters, few, resolution.alternatives),
            tuple(sample.data_row for sample in few["forget"].samples),
        )

    def attributes(
        self,
        plan: Plan,
        directions: Mapping[str, Tensor],
        reference: Reference,
        every_row: np.ndarray | None,
    ) -> dict[str, Any]:
        """Measure the precision, and return the attributes of a result about it.

        Args:
            plan: of a 16-bit model.
            directions: gradients of the risks as the profile has them, `(M, *shape)`.
            reference: prepared for `passes`.
            every_row: the profile's effects of all rows, `(K, M, n)`; None where rows are not told
                apart, or effects are not in memory. The two rows' effects in 16 bits are then found
                once more, and errors are relative to the effects of these two rows alone.

        Returns:
            `precision_error`, a float of `precision_error_of`, and `precision_samples`, the
            numbers of the forget rows; or `precision_note`, which says why there is no error.
        """
        needed = 4 * sum(p.numel() for p in plan.model.parameters())
        free = free_memory(plan.device)
        if needed > free:
            gib = f"{needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
            return {"precision_note": f"not measured: the weights in float32 take {gib}"}
        try:
            found = (
                self._effects(plan, directions, reference)
                if every_row is None
                else every_row[:, :, self._places]
            )
            exact = self._effects(_in_fp32(plan), directions, reference)
        except Exception as error:  # the profile is valid without this check
            said = next(iter(str(error).strip().splitlines()), "")
            return {"precision_note": f"not measured: {type(error).__name__}: {said}"}
        return {
            "precision_error": precision_error_of(
                self._mean_squares(found - exact, self.resolution),
                self._mean_squares(exact, self.resolution)
                if every_row is None
                else self._mean_squares(every_row, self.whole),
            ),
            "precision_samples": list(self.rows),
        }

    def _effects(
        self, plan: Plan, directions: Mapping[str, Tensor], reference: Reference
    ) -> np.ndarray:
        """Effects on every risk by row, `(K, M, rows)`; one row where rows are not told apart."""
        n_risks = len(next(iter(directions.values())))
        shape = self.resolution.shape(len(self.mixture), n_risks)
        array = np.zeros(shape)
        parameter_passes = []
        if self.engine == "forward":
            parameter_passes = parameter_passes_for(plan, self.resolution.columns()[1], n_risks)
        device = plan.device
        with torch.autocast(device.type, enabled=False):
            find_effects(
                self.engine,
                plan,
                self.passes,
                directions,
                reference,
                self.mixture,
                self.resolution,
                array,
                parameter_passes=parameter_passes,
                norms=False,
                tick=lambda _: None,
            )
        return by_row(array)

    @property
    def _places(self) -> list[int]:
        """Places of the two rows of each data set among all rows, data set by data set."""
        sizes = [len(each) for each in self.whole.sets.values()]
        return [sum(sizes[:i]) + row for i, n in enumerate(sizes) for row in two_rows(n)]

    def _mean_squares(self, effects: np.ndarray, resolution: Resolution) -> np.ndarray:
        """The mean over rows of squared effects, added up over data sets, `(K, M)`."""
        squares = np.square(effects)
        if "sample" not in resolution.axes:
            return squares.sum(2)
        ends = np.cumsum([len(each) for each in resolution.sets.values()])
        return sum(part.mean(2) for part in np.split(squares, ends[:-1], axis=2))


def two_rows(n: int) -> list[int]:
    """The numbers of the first row of `n` and of the row in the middle."""
    return sorted({0, n // 2})


def precision_error_of(off: np.ndarray, size: np.ndarray) -> float:
    """The relative error of effects, the largest over objectives and risks.

        MARGIN max_{k,m} sqrt(off_km / size_km)

    Errors are relative to the mean over rows, so a row with next to no effect counts as little as
    in a total. Objectives without an effect on a risk are left out.

    Args:
        off: mean square, over rows, of effects in 16 bits less those in fp32 on the same weights,
            along the same directions, `(K, M)`.
        size: mean square of effects, `(K, M)`.
    """
    counts = size > NEGLIGIBLE**2 * size.max(axis=0)
    return MARGIN * float(np.sqrt((off[counts] / size[counts]).max(initial=0.0)))


def _in_fp32(plan: Plan) -> Plan:
    """A plan of a copy of the model in fp32, with an attention that supports fp32.

    The plan is a copy too, with all that the choice of the layout has found out about the use of
    parameters.
    """
    in_fp32: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().float(), p.requires_grad) for p in plan.model.parameters()
    }
    for b in plan.model.buffers():
        if b.is_floating_point():
            in_fp32[id(b)] = b.to(torch.float32, copy=True)
    plan = copy.deepcopy(plan, in_fp32)  # takes the fp32 tensors in place of copies
    wide: Any = plan.model
    attention = getattr(getattr(wide, "config", None), "_attn_implementation", None)
    if "flash" in str(attention):
        wide.set_attn_implementation("sdpa")
    return plan

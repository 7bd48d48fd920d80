"""What a result speaks of: the trainable parameters, beside the frozen and the shared ones."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Coverage:
    """How many parameters a model has, each counted once however often it is used.

    Attributes:
        covered_parameters, covered_elements: trainable ones that the result speaks of.
        trainable_parameters, trainable_elements: all that ask for a gradient.
        frozen_parameters, frozen_elements: those that do not, and are left out.
        tied: all names of every parameter that has several, its first name first.
    """

    covered_parameters: int
    covered_elements: int
    trainable_parameters: int
    trainable_elements: int
    frozen_parameters: int
    frozen_elements: int
    tied: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, uncovered: Collection[str] = ()) -> Coverage:
        """Count the parameters of `model`; `uncovered` are trainable ones that were missed."""
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        covered = [size for name, size in trainable.items() if name not in uncovered]
        frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        return cls(
            covered_parameters=len(covered),
            covered_elements=sum(covered),
            trainable_parameters=len(trainable),
            trainable_elements=sum(trainable.values()),
            frozen_parameters=len(frozen),
            frozen_elements=sum(frozen),
            tied=tuple(tuple(several) for several in names.values() if len(several) > 1),
        )

    def attributes(self) -> dict[str, int | str]:
        """As attributes of a result."""
        return vars(self) | {"tied": json.dumps(self.tied)}

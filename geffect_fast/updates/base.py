"""The base class of update rules: a name, parameters, needs, and the gradient that is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from geffect_fast.objectives.parameters import Parameterised

if TYPE_CHECKING:
    from geffect_fast.updates.step import Step

Need = Literal["retain", "retain_rows", "retain_part", "optimizer", "full_precision"]
"""A need of a rule beside the gradient of the forget part.

    retain          the gradient of the retain rows together
    retain_rows     inner products of the gradients of single retain rows
    retain_part     a retain part in the objective, as the retain gradient is part of the update
    optimizer       the state of the optimizer, whose metric it measures in
    full_precision  weights in fp32 or fp64, as it moves them by little
"""


@dataclass(frozen=True)
class UpdateRule(Parameterised, ABC):
    """A rule that makes one update of the gradients of a forget part and of the retain rows.

    Subclasses are frozen dataclasses declared as objectives are; `register` gives them a name.

    Class attributes:
        name: the rule's name in strings, set by `register`.
        needs: what the rule needs; asking a `Step` for anything else is an error.
    """

    noun: ClassVar[str] = "update"
    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def apply(self, step: Step) -> None:
        """Write the parameters' final `.grad`.

        Args:
            step: gives the gradients and products of one update, for its rows and weights.
        """

    @property
    def reads_retain(self) -> bool:
        """Whether the rule needs retain rows, whatever the objective is."""
        return not self.needs.isdisjoint(("retain", "retain_rows", "retain_part"))

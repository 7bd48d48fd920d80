"""What an update rule is: a name, parameters, what it needs, and the gradient that it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from geffect_fast.objectives.parameters import Parameterised

if TYPE_CHECKING:
    from geffect_fast.updates.step import Step

Need = Literal["retain", "retain_rows", "retain_part", "optimizer", "full_precision"]
"""What a rule needs beside the gradient of the forget part.

    retain          the gradient of the retain rows together
    retain_rows     inner products of the gradients of single retain rows
    retain_part     a retain part in the objective, as the retain gradient is part of the update
    optimizer       the state of the optimizer, whose metric it measures in
    full_precision  weights in fp32 or fp64, as it moves them by little
"""


@dataclass(frozen=True)
class UpdateRule(Parameterised, ABC):
    """How the gradients of an objective's forget part and of the retain rows become an update.

    Subclasses are frozen dataclasses declared as objectives are; `register` gives them a name.

    Class attributes:
        name: what it is called in strings, set by `register`.
        needs: what it needs; asked for otherwise it is an error.
    """

    noun: ClassVar[str] = "update"
    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def apply(self, step: Step) -> None:
        """Write the parameters' final `.grad`.

        Args:
            step: gives gradients and products, of the rows and weights of one update.
        """

    @property
    def reads_retain(self) -> bool:
        """Whether it needs retain rows whatever the objective is."""
        return not self.needs.isdisjoint(("retain", "retain_rows", "retain_part"))

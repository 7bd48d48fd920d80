"""The losses of open-unlearning's trainers by name, written in objectives of this package.

`open_unlearning.NPO` is the whole loss of the trainer NPO, `gamma` times the forget part and
`alpha` times the NLL of the retain rows, with the parameters of the trainer's configs under their
names. The released code follows the papers' formulas, except where `differs` says otherwise; the
objectives here are the papers'.
Source: github.com/locuslab/open-unlearning (MIT), src/trainer and configs/trainer.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, NamedTuple

from geffect_fast.errors import InputError
from geffect_fast.objectives.base import Composite, Objective, combine
from geffect_fast.objectives.divergence import CEU, UNDIAL
from geffect_fast.objectives.likelihood import GA, GD, NLL, WGA, SatImp
from geffect_fast.objectives.parameters import parameter, written
from geffect_fast.objectives.preference import DPO, NPO, SimNPO
from geffect_fast.objectives.primal_dual import PDU
from geffect_fast.objectives.registry import OBJECTIVES, REQUIRED
from geffect_fast.objectives.representation import RMU, RR
from geffect_fast.registry import nearest

PREFIX = "open_unlearning."


class _Trainer(Composite):
    """The loss of a trainer of open-unlearning; `expanded` writes it in objectives of this package.

    Class attributes:
        differs: the differences of the released code from this loss, in words.
    """

    differs: ClassVar[str] = ""

    def expanded(self) -> Objective:
        terms = self.terms()
        return combine([term for term in terms if term[0] != 0] or terms)


class _WithRetain(_Trainer):
    """`gamma` times a forget part, and `alpha` times the NLL of the retain rows."""

    gamma: float
    alpha: float

    def forget(self) -> Objective:
        """The forget part."""
        raise NotImplementedError

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((self.gamma, self.forget()), (self.alpha, NLL()))


@dataclass(frozen=True)
class _GradAscent(_Trainer):
    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((1.0, GA()),)


@dataclass(frozen=True)
class _GradDiff(_Trainer):
    gamma: float = parameter(1.0, at_least=0)
    alpha: float = parameter(1.0, at_least=0)

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((1.0, GD(self.gamma, self.alpha)),)


@dataclass(frozen=True)
class _NPO(_WithRetain):
    beta: float = parameter(0.1, above=0)
    gamma: float = parameter(1.0)
    alpha: float = parameter(1.0)

    def forget(self) -> Objective:
        return NPO(self.beta)


@dataclass(frozen=True)
class _SimNPO(_WithRetain):
    beta: float = parameter(4.5, above=0)
    delta: float = parameter(0.0)
    gamma: float = parameter(0.125)
    alpha: float = parameter(1.0)

    def forget(self) -> Objective:
        return SimNPO(self.beta, self.delta)


@dataclass(frozen=True)
class _DPO(_WithRetain):
    differs = "draws another refusal for a question each time; here row i has refusal i"

    beta: float = parameter(0.1, above=0)
    gamma: float = parameter(1.0)
    alpha: float = parameter(1.0)

    def forget(self) -> Objective:
        return DPO(self.beta)


@dataclass(frozen=True)
class _RMU(_Trainer):
    differs = (
        "draws its own u; multiplies the mean over rows of their sums by the mean of their 1/n; "
        "of the last block it takes the state before the model's final norm"
    )

    block: int = parameter(7, at_least=0)
    steering_coeff: float = parameter(2.0, at_least=0)
    gamma: float = parameter(1.0)
    alpha: float = parameter(1.0)
    seed: int = parameter(0, at_least=0)

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        layer = self.block + 1  # hidden state 0 is the embeddings
        steered = RMU(layer, self.steering_coeff, True, self.seed)
        return ((self.gamma, steered), (self.alpha, RR(layer)))


@dataclass(frozen=True)
class _UNDIAL(_WithRetain):
    differs = (
        "takes the mean over prompts and padding too, and lowers some other token's logit there"
    )

    beta: float = parameter(10.0, at_least=0)
    gamma: float = parameter(1.0)
    alpha: float = parameter(0.0)

    def forget(self) -> Objective:
        return UNDIAL(self.beta)


@dataclass(frozen=True)
class _CEU(_Trainer):
    ignore_first_n_answer_tokens: int = parameter(1, at_least=0)

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((1.0, CEU(self.ignore_first_n_answer_tokens)),)


@dataclass(frozen=True)
class _SatImp(_WithRetain):
    beta1: float = parameter(5.0, at_least=0)
    beta2: float = parameter(1.0, at_least=0)
    gamma: float = parameter(0.1)
    alpha: float = parameter(1.0)

    def forget(self) -> Objective:
        return SatImp(self.beta1, self.beta2)


@dataclass(frozen=True)
class _WGA(_WithRetain):
    beta: float = parameter(1.0, at_least=0)
    gamma: float = parameter(1.0)
    alpha: float = parameter(1.0)

    def forget(self) -> Objective:
        return WGA(self.beta)


@dataclass(frozen=True)
class _PDU(_Trainer):
    differs = (
        "flattens logits at positions that hold a label; here at those that predict one. alpha is "
        "where its multiplier begins, which it moves while it trains; here it stays"
    )

    retain_loss_eps: float = parameter(at_least=0)
    dual_step_size: float = parameter(1.0, at_least=0)
    gamma: float = parameter(1.0, at_least=0)
    alpha: float = parameter(1.0, at_least=0)

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return ((1.0, PDU(self.gamma, self.retain_loss_eps, self.dual_step_size, self.alpha)),)


TRAINERS: dict[str, type[_Trainer]] = {
    kind.__name__.removeprefix("_"): kind
    for kind in (
        *(_GradAscent, _GradDiff, _NPO, _SimNPO, _DPO, _RMU),
        *(_UNDIAL, _CEU, _SatImp, _WGA, _PDU),
    )
}
"""The trainers by the `handler` of their configs."""

for _name, _kind in TRAINERS.items():
    _kind.name = f"{PREFIX}{_name}"

_FOLDED = {name.lower(): kind for name, kind in TRAINERS.items()}


def lookup(name: str) -> type[Objective]:
    """The class of an objective's name, or of a trainer of open-unlearning: `open_unlearning.NPO`.

    A trainer's name needs no prefix where no objective has the same name, as with `GradAscent`;
    `NPO` is the objective `npo`.

    Raises:
        InputError: there is no such name; the nearest one is offered.
    """
    folded = name.lower()
    if not name.startswith(PREFIX):
        alone = folded in _FOLDED and folded not in OBJECTIVES.classes
        return _FOLDED[folded] if alone else OBJECTIVES.lookup(name)
    trainer = name.removeprefix(PREFIX)
    if trainer.lower() not in _FOLDED:
        raise InputError(
            f"there is no objective for a trainer {trainer[:40]!r} of open-unlearning; "
            f"{nearest(trainer, tuple(TRAINERS))}"
        )
    return _FOLDED[trainer.lower()]


class DescribedTrainer(NamedTuple):
    """The description of a trainer of open-unlearning.

    Attributes:
        text: its string with every parameter as its config has it, or `REQUIRED`.
        objective: the same loss in objectives of this package.
        differs: the differences of the released code from this loss, in words.
    """

    text: str
    objective: str
    differs: str


_ANY = 0.123456789
"""A number in place of a required parameter, found again in the texts made with it."""


def described_trainers() -> list[DescribedTrainer]:
    """Descriptions of all trainers of open-unlearning."""
    found = []
    for kind in TRAINERS.values():
        values = {f.name: _ANY if f.default is MISSING else f.default for f in fields(kind)}
        made = kind(**values)
        texts = [str(each).replace(written(_ANY), REQUIRED) for each in (made, made.expanded())]
        found.append(DescribedTrainer(texts[0], texts[1], kind.differs))
    return found

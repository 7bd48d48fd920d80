"""open-unlearning's trainers by their names: what each descends on, in objectives of ours.

`open_unlearning.NPO` is its trainer's whole loss, `gamma` times the forget part and `alpha` times
the NLL of the retain rows, with the parameters of its configs under their names. Its formulas are
those of the papers but for what `differs` says; ours are the papers'.
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
    """The loss of one of its trainers, which is written in our objectives once it is named.

    Class attributes:
        differs: what its released code computes otherwise.
    """

    differs: ClassVar[str] = ""

    def expanded(self) -> Objective:
        terms = self.terms()
        return combine([term for term in terms if term[0] != 0] or terms)


class _WithRetain(_Trainer):
    """A forget part and the NLL of the retain rows, as often as its configs say."""

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
"""By the `handler` of its configs."""

for _name, _kind in TRAINERS.items():
    _kind.name = f"{PREFIX}{_name}"

_FOLDED = {name.lower(): kind for name, kind in TRAINERS.items()}


def lookup(name: str) -> type[Objective]:
    """The objective of a name, or a trainer of open-unlearning: `open_unlearning.NPO`.

    A trainer's name does alone where it is none of ours, as `GradAscent` is; `NPO` is our `npo`.

    Raises:
        InputError: there is none; the nearest name is offered.
    """
    folded = name.lower()
    if not name.startswith(PREFIX):
        alone = folded in _FOLDED and folded not in OBJECTIVES.classes
        return _FOLDED[folded] if alone else OBJECTIVES.lookup(name)
    trainer = name.removeprefix(PREFIX)
    if trainer.lower() not in _FOLDED:
        raise InputError(
            f"no objective is that of open-unlearning's trainer {trainer[:40]!r}; "
            f"{nearest(trainer, tuple(TRAINERS))}"
        )
    return _FOLDED[trainer.lower()]


class DescribedTrainer(NamedTuple):
    """One of its trainers, as it may be written.

    Attributes:
        text: with all parameters as its config has them, or `REQUIRED`.
        objective: the same in ours.
        differs: what its released code computes otherwise.
    """

    text: str
    objective: str
    differs: str


_ANY = 0.123456789
"""Stands for a parameter that has to be given, and is found again in what is made of it."""


def described_trainers() -> list[DescribedTrainer]:
    """All of them."""
    found = []
    for kind in TRAINERS.values():
        values = {f.name: _ANY if f.default is MISSING else f.default for f in fields(kind)}
        made = kind(**values)
        texts = [str(each).replace(written(_ANY), REQUIRED) for each in (made, made.expanded())]
        found.append(DescribedTrainer(texts[0], texts[1], kind.differs))
    return found

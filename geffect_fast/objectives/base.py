"""The base classes of objectives: the data they read, their needs, their terms and their sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from geffect_fast.data.batch import Batch, Role
from geffect_fast.errors import InputError
from geffect_fast.objectives.parameters import Parameterised, finite, written

Need = Literal[
    "logits",
    "hidden_states",
    "reference",
    "reference_logits",
    "reference_hidden_states",
    "weights",
]
REFERENCE_NEEDS: frozenset[Need] = frozenset(
    {"reference", "reference_logits", "reference_hidden_states"}
)
WEIGHTS = "a list 'weights' in every row, one number a label token (gf.write_weighted writes them)"
"""The input that an objective with the need `weights` asks for, in messages."""

T = TypeVar("T")


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on a batch; the reference model's outputs have the same shape.

    Attributes:
        token_logprob: `(total_tokens,)` log-probability of `batch.targets`, fp32 or better, 0 where
            there is no target; differentiable for the model, detached for the reference.
        logits: `(n_targets, vocab)` logits at `batch.target_index`; None where not asked for.
        hidden_states: `(total_tokens, d)` each, index 0 the embeddings, as transformers counts
            them; None where not asked for.
    """

    token_logprob: Tensor
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """All outputs that are there, in order."""
        logits = () if self.logits is None else (self.logits,)
        return (self.token_logprob, *logits, *(self.hidden_states or ()))

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], has_logits: bool) -> Outputs:
        """The outputs whose `tensors()` are these."""
        token_logprob, *rest = tensors
        states = tuple(rest[has_logits:])
        return cls(token_logprob, rest[0] if has_logits else None, states or None)


@dataclass(frozen=True)
class Objective(Parameterised):
    """A function to descend on: `loss` is its share on one batch, the sum over batches the whole.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters, annotated `float`,
    `int` or `bool`; `parameter` declares their ranges. Objectives add up and scale:
    `NPO(beta=0.1) + 0.5 * KL()`. Two objectives are equal when their classes and parameters are,
    however they were written.

    Class attributes:
        name: the name in objective strings, set by `register`; until then the class's name.
        on: the data set that is read, `forget` or `retain`.
        roles: the sequences of a sample that are read.
        needs: the inputs besides the log-probabilities of the labels: `weights` come with the data,
            all others are computed.
        term_at: the position of the token term about a label: `prediction`, the one that predicts
            the label, or `label`, the one that holds the label.
    """

    noun: ClassVar[str] = "objective"
    name: ClassVar[str]
    on: ClassVar[Literal["forget", "retain"]] = "forget"
    roles: ClassVar[tuple[Role, ...]] = ("answer",)
    needs: ClassVar[frozenset[Need]] = frozenset()
    term_at: ClassVar[Literal["prediction", "label"]] = "prediction"

    # numpy scalars on the left leave the multiplication to __rmul__
    __array_ufunc__: ClassVar[None] = None

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        """This batch's share of the objective, a scalar: the published formula itself."""
        raise NotImplementedError(f"{type(self).__name__} must define loss()")

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        """Per-token terms `(total_tokens,)` whose sum has the gradient of `loss`."""
        raise NotImplementedError(f"{type(self).__name__} must define token_terms()")

    def parts(self) -> tuple[tuple[float, Objective], ...]:
        """The weighted sum of parts, `((coefficient, part), ...)`: here the objective alone."""
        return ((1.0, self),)

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        return combine([(1.0, self), (1.0, other)])

    def __sub__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        return combine([(1.0, self), (-1.0, other)])

    def __mul__(self, coefficient: float) -> Objective:
        return combine([(coefficient, self)])

    __rmul__ = __mul__

    def __neg__(self) -> Objective:
        return combine([(-1.0, self)])


class Composite(Objective):
    """An objective that is a weighted sum of others, possibly on different data.

    No single batch holds all the data of the sum, so engines evaluate its `parts()`.
    """

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        """The weighted sum, `((coefficient, objective), ...)`; the objectives may be composite."""
        raise NotImplementedError(f"{type(self).__name__} must define terms()")

    def parts(self) -> tuple[tuple[float, Objective], ...]:
        return tuple(
            (outer * inner, part)
            for outer, objective in self.terms()
            for inner, part in objective.parts()
        )

    def loss(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        raise TypeError(f"{self} reads several data sets: evaluate its parts() one by one")

    def token_terms(self, outputs: Outputs, batch: Batch, reference: Outputs | None) -> Tensor:
        raise TypeError(f"{self} reads several data sets: evaluate its parts() one by one")


@dataclass(frozen=True)
class Sum(Composite):
    """A weighted sum written out by the user; made by `+`, `-` and `*`, never nested.

    Attributes:
        summands: `((coefficient, objective), ...)`, none of the objectives a `Sum`.
    """

    summands: tuple[tuple[float, Objective], ...]

    name: ClassVar[str] = "sum"

    def terms(self) -> tuple[tuple[float, Objective], ...]:
        return self.summands

    def parameters(self) -> dict[str, Any]:
        """`{"terms": [...]}` with coefficient, name and parameters of every summand."""
        return {
            "terms": [
                {"coefficient": c, "name": o.name, "parameters": o.parameters()}
                for c, o in self.summands
            ]
        }

    def __str__(self) -> str:
        """The summands' canonical strings; a coefficient of 1 is left out."""
        text = ""
        for coefficient, objective in self.summands:
            sign = "-" if coefficient < 0 else "+"
            size = "" if abs(coefficient) == 1 else f"{written(abs(coefficient))}*"
            text += f" {sign} {size}{objective}"
        return text[3:] if text.startswith(" + ") else "-" + text[3:]


def combine(terms: Iterable[tuple[float, Objective]]) -> Objective:
    """The weighted sum of objectives, nested sums flattened; one term of weight 1 is that term.

    Args:
        terms: `(coefficient, objective)` pairs, at least one.

    Raises:
        InputError: a coefficient, or a product of nested ones, is not a finite number.
    """
    flat: list[tuple[float, Objective]] = []
    for coefficient, objective in terms:
        inner = objective.summands if isinstance(objective, Sum) else ((1.0, objective),)
        for factor, summand in inner:
            outer = finite(coefficient)
            product = None if outer is None else finite(outer * factor)
            if product is None:
                raise InputError(
                    f"the coefficient of {summand} must be a finite number, "
                    f"got {coefficient!r}{'' if factor == 1 else f' * {factor!r}'}"
                )
            flat.append((product, summand))
    return flat[0][1] if len(flat) == 1 and flat[0][0] == 1 else Sum(tuple(flat))


def required(objective: Objective, value: T | None, what: str) -> T:
    """`value`, checked to be there, as it is among the objective's `needs`.

    Raises:
        InputError: `value` is None.
    """
    if value is None:
        raise InputError(f"objective {objective} needs {what}, and none were given")
    return value

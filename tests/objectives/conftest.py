"""Small data sets whose every number is known, cut into batches by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from geffect_fast.data.batch import IGNORE, REDUCTIONS, Batch, Reduction, Role, Totals
from geffect_fast.objectives import Outputs

VOCAB, WIDTH, LAYERS = 7, 5, 9


@dataclass
class Sequence_:
    """A sequence: its labels, and the outputs of the model and its reference at each token."""

    role: Role
    labels: list[int]
    logits: Tensor  # (length, vocab)
    reference_logits: Tensor  # (length, vocab)
    hidden: Tensor  # (layers, length, width)
    reference_hidden: Tensor  # (layers, length, width)
    weights: list[float]  # for the labels that are predicted

    def targets(self) -> list[int]:
        return [*self.labels[1:], IGNORE]

    def target_weights(self) -> list[float]:
        """The weight of the label that each token predicts, 0 where it predicts none."""
        own = iter(self.weights)
        return [0.0 if y == IGNORE else next(own) for y in self.targets()]

    def _logprobs(self, logits: Tensor) -> list[float]:
        logp = logits.log_softmax(-1)
        return [float(logp[t, y]) for t, y in enumerate(self.targets()) if y != IGNORE]

    def logp(self) -> list[float]:
        return self._logprobs(self.logits)

    def logp0(self) -> list[float]:
        return self._logprobs(self.reference_logits)


@dataclass
class Case:
    """A batch, with the leaf tensors its outputs depend on."""

    batch: Batch
    outputs: Outputs
    reference: Outputs
    logits: Tensor
    hidden: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.logits, self.hidden]


@dataclass
class DataSet:
    """Samples as lists of sequences; `case` cuts a batch out of it."""

    samples: list[list[Sequence_]]

    def totals(self) -> Totals:
        sequences = [q for sample in self.samples for q in sample]
        roles: tuple[Role, ...] = ("answer", "alternative")
        return Totals(
            n_samples=len(self.samples),
            sequence_targets={
                r: tuple(len(q.logp()) for q in sequences if q.role == r) for r in roles
            },
            n_labelled={
                r: sum(y != IGNORE for q in sequences if q.role == r for y in q.labels)
                for r in roles
            },
        )

    def case(self, reduction: Reduction, rows: Sequence[int] | None = None) -> Case:
        rows = tuple(range(len(self.samples))) if rows is None else tuple(rows)
        sequences = [q for row in rows for q in self.samples[row]]
        lengths = [len(q.labels) for q in sequences]
        per_sample = [sum(len(q.labels) for q in self.samples[row]) for row in rows]
        logits = torch.cat([q.logits for q in sequences]).requires_grad_()
        hidden = torch.cat([q.hidden for q in sequences], dim=1).requires_grad_()
        targets = torch.tensor([y for q in sequences for y in q.targets()])
        sequence_sample = [i for i, row in enumerate(rows) for _ in self.samples[row]]
        batch = Batch(
            input_ids=torch.zeros(1, sum(lengths), dtype=torch.long),
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            labels=torch.tensor([y for q in sequences for y in q.labels]),
            targets=targets,
            cu_seqlens=offsets(lengths),
            cu_samples=offsets(per_sample),
            roles=tuple(q.role for q in sequences),
            sequence_sample=torch.tensor(sequence_sample),
            rows=rows,
            totals=self.totals(),
            reduction=reduction,
            weights=torch.tensor(
                [w for q in sequences for w in q.target_weights()], dtype=torch.float64
            ),
        )
        reference_logits = torch.cat([q.reference_logits for q in sequences])
        reference_hidden = torch.cat([q.reference_hidden for q in sequences], dim=1)
        return Case(
            batch,
            outputs_of(logits, targets, hidden),
            outputs_of(reference_logits, targets, reference_hidden),
            logits,
            hidden,
        )


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def outputs_of(logits: Tensor, targets: Tensor, hidden: Tensor | None = None) -> Outputs:
    """The outputs of a model with these logits `(total_tokens, vocab)`."""
    known = targets != IGNORE
    picked = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return Outputs(
        token_logprob=torch.where(known, picked, torch.zeros_like(picked)),
        logits=logits[known],
        hidden_states=None if hidden is None else tuple(hidden),
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on tensors of a few dozen numbers threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_data() -> Callable[..., DataSet]:
    """`make_data(roles, seed=0, n_samples=6, scale=1.0)`: ragged samples with every odd shape.

    Prompts of length 0 to 4 (with 0 the first token carries a label that nothing predicts), labels
    with holes, weights from 0 to 2, one sample without any label and, of several roles, one sample
    without the second and one with three of it.
    """

    def make(
        roles: Sequence[Role], seed: int = 0, n_samples: int = 6, scale: float = 1.0
    ) -> DataSet:
        generator = torch.Generator().manual_seed(seed)
        other = torch.Generator().manual_seed(1000 + seed)

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def sequence(role: Role, silent: bool) -> Sequence_:
            prompt, answer = below(5), 2 + below(7)
            labels = [IGNORE] * prompt + [below(VOCAB) for _ in range(answer)]
            if answer > 4:
                labels[prompt + 2] = IGNORE
            if silent:
                labels = [IGNORE] * len(labels)
            logits = scale * normal(len(labels), VOCAB)
            shifted = logits + normal(len(labels), VOCAB)
            hidden = normal(LAYERS, len(labels), WIDTH)
            n_targets = sum(y != IGNORE for y in labels[1:])
            weights = 2 * torch.rand(n_targets, generator=other, dtype=torch.float64)
            weights[:1] = 0
            own = weights.tolist() if role == "answer" else [0.0] * n_targets
            return Sequence_(role, labels, logits, shifted, hidden, normal(*hidden.shape), own)

        samples = []
        for i in range(n_samples):
            mine = [roles[0], *{3: 0, 4: 3}.get(i, 1) * roles[1:]]
            samples.append([sequence(role, silent=i == 2) for role in mine])
        return DataSet(samples)

    return make


@pytest.fixture(params=REDUCTIONS)
def reduction(request: pytest.FixtureRequest) -> Reduction:
    return request.param


@pytest.fixture
def case(make_data: Callable[..., DataSet], reduction: Reduction) -> Case:
    return make_data(("answer",), seed=11).case(reduction)

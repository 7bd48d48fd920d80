"""A teacher-forced pass over all sequences that metrics read, packed, each sequence once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import is_sharded, still_up_to
from geffect_fast.capture.factors import widened
from geffect_fast.capture.shards import put_right
from geffect_fast.data import IGNORE, Layout, Sample, SampleSet, make_batches
from geffect_fast.data.batch import Batch
from geffect_fast.data.samples import TokenSequence as Tokens
from geffect_fast.engines.batches import DataPass, TokenBudget, dealt, each_batch
from geffect_fast.engines.layout import TOLERANCE, close, in_chunks
from geffect_fast.engines.model_outputs import model_outputs, packed_attention, takes
from geffect_fast.errors import NonFiniteError, UnsupportedModelError
from geffect_fast.metrics.observed import Scored
from geffect_fast.precision import precisions
from geffect_fast.ranks import ALONE, Ranks
from geffect_fast.trying import no_memory

Tick = Callable[[int], object]
"""A function that is called with the number of tokens that are done."""

_PROBE = 8
"""Length in tokens of the sequences on which a batch of equal lengths is tried."""


def distinct(sequences: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """The different sequences, and for each given sequence its number among these."""
    numbers: dict[tuple[bytes, bytes], int] = {}
    different: list[Tokens] = []
    which: list[int] = []
    for sequence in sequences:
        key = sequence.input_ids.numpy().tobytes(), sequence.labels.numpy().tobytes()
        if key not in numbers:
            numbers[key] = len(different)
            different.append(sequence)
        which.append(numbers[key])
    return different, which


def batches_of(
    sequences: Sequence[Tokens], budget: TokenBudget, layout: Layout, ranks: Ranks = ALONE
) -> list[Batch]:
    """Batches in which every sequence is a sample of its own, numbered as in `sequences`.

    Each of several ranks is dealt sequences of all lengths, whatever its budget and layout are.
    """
    by_length = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    own, _ = ranks.dealt(by_length)
    samples = tuple(Sample(row, "", sequences[row]) for row in sorted(own))
    return make_batches(
        SampleSet("rows", samples), ("answer",), token_budget=budget.tokens, layout=layout
    )


def shared_out(
    model: nn.Module,
    sequences: Sequence[Tokens],
    budget: TokenBudget,
    layout: Layout,
    ranks: Ranks,
) -> DataPass:
    """A pass over this rank's share of the sequences.

    Where ranks share out the model, and so keep step, every rank has the same number of batches.
    """
    if not is_sharded(model):
        return DataPass(batches_of(sequences, budget, layout, ranks), token_budget=budget)
    return dealt(DataPass(batches_of(sequences, budget, layout)), ranks, in_step=True)


def score(
    model: nn.Module,
    sequences: Sequence[Tokens],
    places: Sequence[str],
    budget: TokenBudget,
    layout: Layout,
    *,
    distribution: bool = False,
    what: str = "model",
    tick: Tick = lambda _: None,
    ranks: Ranks = ALONE,
) -> list[Scored]:
    """Scores of the sequences' label tokens by a model; equal sequences are computed once.

    Log-probabilities are taken in fp32, also from bf16 logits, and in fp64 for fp64 models.

    Args:
        model: a model in eval mode.
        sequences: sequences with at least one label token each.
        places: name of each sequence in messages.
        budget: the tokens of a batch; numbers depend on it by rounding alone.
        layout: a layout that `forward_layout` found.
        distribution: whether to form mean and spread of the tokens' log-probabilities too.
        what: the model's name in messages.
        tick: called with the number of tokens that are done.
        ranks: the ranks that share out the sequences.

    Raises:
        NonFiniteError: a log-probability is NaN or infinite; the row is named.
    """
    different, which = distinct(sequences)
    found: dict[int, Scored] = {}
    for _, attempt in each_batch([shared_out(model, different, budget, layout, ranks)]):
        with attempt:
            values = _token_values(model, attempt.batch, distribution)
            numbers = values.cpu().numpy()
            lengths = [different[row].n_targets for row in attempt.batch.rows]
            pieces = np.split(numbers, np.cumsum(lengths)[:-1], axis=1)
            for row, piece in zip(attempt.batch.rows, pieces, strict=True):
                if not np.isfinite(piece).all():
                    place = places[which.index(row)]
                    raise NonFiniteError(
                        f"{place}: the {what} gives its answer a log-probability that is NaN or "
                        "infinite",
                        remedy="give a model whose logits are finite there, or drop the row",
                    )
                found[row] = _scored(piece)
            tick(attempt.batch.total_tokens)
    found = ranks.united(found)
    return [found[row] for row in which]


@torch.no_grad()
def _token_values(model: nn.Module, batch: Batch, distribution: bool) -> Tensor:
    """Log-probability, greedy or not, and if asked mean and spread, `(2 or 4, n_targets)` fp64."""
    moved = batch.to(next(model.parameters()).device)
    with packed_attention(model, moved):
        outputs = model_outputs(model, moved, {"logits"})
    index = moved.target_index
    logits = outputs.logits
    assert logits is not None
    rows = [outputs.token_logprob[index], logits.argmax(-1) == moved.targets[index]]
    if distribution:
        log_p = torch.log_softmax(widened(logits), -1)
        p = log_p.exp()
        seen = torch.where(p > 0, log_p, 0)  # a token of probability 0 adds nothing
        mean = (p * seen).sum(-1)
        rows += [mean, (p * (seen - mean[:, None]).square()).sum(-1).sqrt()]
    return torch.stack([row.double() for row in rows])


def _scored(values: np.ndarray) -> Scored:
    log_prob, greedy, *more = values
    mean, spread = more or (None, None)
    return Scored(-float(log_prob.mean()), log_prob, greedy > 0, mean, spread)


def forward_layout(model: nn.Module, sequences: Sequence[Tokens]) -> Layout:
    """The fastest layout in which a model scores sequences as it scores each by itself.

    The order of trial is packed, then several of one length, then one by one. The model is tried on
    the first, the last, the shortest and the longest sequence.

    Raises:
        UnsupportedModelError: the model does not run on one sequence.
    """
    by_length = sorted(sequences, key=len)
    some = [sequences[0], sequences[-1], by_length[0], by_length[-1]]
    alibi = getattr(getattr(model, "config", None), "alibi", False)
    may_pack = takes(model, "position_ids") and not (alibi or in_chunks(model))
    if may_pack and len(by_length[-1]) <= still_up_to(model) and _agrees(model, some, "packed"):
        return "packed"
    equal = [_cut(each, _PROBE) for each in some]
    return "equal_length" if _agrees(model, equal, "equal_length") else "single"


def _cut(sequence: Tokens, n: int) -> Tokens:
    """`n` tokens of a sequence, which is repeated if shorter; all but the first are labelled."""
    ids = sequence.input_ids.repeat(-(-n // len(sequence)))[:n]
    return Tokens(ids, torch.cat([ids.new_tensor([IGNORE]), ids[1:]]))


@torch.no_grad()
def _agrees(model: nn.Module, sequences: Sequence[Tokens], layout: Layout) -> bool:
    """Whether sequences get the same log-probabilities together as each by itself."""
    device = next(model.parameters()).device
    everything = TokenBudget(sum(map(len, sequences)))

    def said(layout: Layout) -> Tensor:
        found = []
        for batch in batches_of(sequences, everything, layout):
            moved = batch.to(device)
            with packed_attention(model, moved):
                found.append(model_outputs(model, moved).token_logprob.cpu())
        return torch.cat(found)

    try:
        own = said("single")
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UnsupportedModelError(
            f"{type(model).__name__}: it cannot be evaluated on one sequence by itself ({reason}); "
            "give a causal language model that runs on one"
        ) from error
    try:
        together = said(layout)
    except Exception as error:  # models that cannot be called this way raise anything
        if is_sharded(model) and no_memory(error):
            raise  # other ranks may have had the memory
        put_right(model)
        return False
    return close(together, own, max(TOLERANCE[dtype] for dtype in precisions(model)))

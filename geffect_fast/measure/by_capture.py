"""The numbers of `plain_autograd`, computed by capture: by the reverse engine and by `functional`.

Profiles and the per-sample functions are made of the same code, so checking these numbers checks
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.capture.attribution import ANY
from geffect_fast.capture.compat import frequencies_at_first
from geffect_fast.capture.keys import function_key, model_key
from geffect_fast.data import Layout, SampleSet, estimate_token_budget, make_batches
from geffect_fast.data.batch import Batch
from geffect_fast.data.packing import split_batch
from geffect_fast.engines.batches import (
    Attempt,
    DataPass,
    Tick,
    TokenBudget,
    dealt,
    mixture_of,
    passes_for,
)
from geffect_fast.engines.directions import accumulate_gradients
from geffect_fast.engines.model_outputs import (
    logits_of,
    positions,
    without_cache,
)
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.functional import norms_and_products, products_of_pairs
from geffect_fast.measure.plain_autograd import Numbers, token_logprob
from geffect_fast.measure.sources import parts_of
from geffect_fast.objectives import NLL, Objective


class CapturedNumbers:
    """`Numbers` of a model, from samples that are packed into batches as a profile packs them.

    Where ranks share out the model, each rank has all numbers in the end.

    Args:
        plan: of the model.
        sample_set: serves as forget data, retain data and data of the risk (`nll`).
        objectives: elementary ones or sums.
        reference: what objectives compare with; None: the model itself.
        layout: how samples share a batch.
        token_budget: tokens a batch; None: chosen from free memory.
    """

    def __init__(
        self,
        plan: Plan,
        sample_set: SampleSet,
        objectives: Sequence[Objective],
        reference: nn.Module | None,
        layout: Layout,
        token_budget: int | None,
    ) -> None:
        self.plan = plan
        self.n = len(sample_set)
        self.objectives = objectives
        self.reference = reference
        self.parts = parts_of(objectives)
        self.token_budget = allowed = TokenBudget(
            token_budget
            or estimate_token_budget(plan.model, n_directions=1, shared=True, logits=True)
        )
        batches_of = partial(make_batches, sample_set, token_budget=allowed.tokens, layout=layout)
        self.risk = DataPass(batches_of(("answer",)), {0: NLL()}, token_budget=allowed)
        offsets = {"forget": 0, "retain": self.n}
        self.passes = passes_for(self.parts, lambda _, roles: batches_of(roles), offsets, allowed)

    @property
    def pairs(self) -> list[tuple[Batch, Batch]]:
        """All pairs of batches, among them each batch with itself."""
        batches = self.risk.batches
        return [(a, b) for x, a in enumerate(batches) for b in batches[x:]]

    @property
    def n_tokens(self) -> int:
        """Tokens that `compute` runs forward."""
        once = self.risk.n_tokens
        paired = sum(_tokens(a, b) for a, b in self.pairs)
        return once + sum(data_pass.n_tokens for data_pass in self.passes) + paired

    def compute(self, tick: Tick) -> Numbers:
        """Find effects by the reverse engine, norms and products by `geffect_fast.functional`."""
        self.plan.learned.served.clear()
        # Plain autograd is compared with all of it, so functional need not show by itself that rows
        # belong to their samples.
        key = function_key(_sample_nll), model_key(self.plan.model)
        self.plan.learned.note_shown(key, ANY)
        return Numbers(self._effects(tick), *self._norms_and_products(tick))

    def _effects(self, tick: Tick) -> Tensor:
        device, shards = self.plan.device, self.plan.shards
        reference, passes, risk = Reference(self.reference), self.passes, self.risk
        if shards is not None:
            risk, *passes = (dealt(each, shards.ranks, in_step=True) for each in (risk, *passes))
        _, directions = accumulate_gradients(self.plan, [risk], 1, reference, tick)
        reference.prepare(passes, device)
        mixture = mixture_of(self.objectives, self.parts)
        shape = (len(self.objectives), len(self.plan.parameters), 2 * self.n)
        found = torch.zeros(shape, dtype=torch.float64)

        def collect(data_pass: DataPass, batch: Batch, effects: Tensor) -> None:
            mixed = torch.tensordot(mixture[:, list(data_pass.parts)], effects[:, 0], dims=1)
            found[:, :, torch.tensor(batch.rows) + data_pass.offset] += mixed

        reverse_effects(
            self.plan,
            passes,
            directions,
            len(self.parts),
            reference,
            collect,
            norms=False,
            tick=tick,
        )
        return found

    def _norms_and_products(self, tick: Tick) -> tuple[Tensor, Tensor]:
        norms = torch.zeros(len(self.plan.parameters), self.n, dtype=torch.float64)
        products = torch.zeros(len(self.plan.parameters), self.n, self.n, dtype=torch.float64)
        plan, pairs = self.plan, self.pairs
        while pairs:
            a, b = pairs.pop()
            larger = max(a, b, key=lambda batch: batch.n_samples)
            # Ranks that share out the model all run the same batches: one rank alone could not run
            # a batch again.
            attempt = Attempt(larger, self.token_budget if plan.shards is None else None)
            with attempt:
                rows, columns = torch.tensor(a.rows), torch.tensor(b.rows)
                if a is b:
                    own, found = map(
                        _stacked, norms_and_products(plan, _sample_nll, self._given(a))
                    )
                    norms[:, rows] = own
                else:
                    given = self._given(a), self._given(b)
                    found = _stacked(
                        products_of_pairs(plan, _sample_nll, *given, per_parameter=True)
                    )
                products[:, rows[:, None], columns] = found
                products[:, columns[:, None], rows] = found.mT
                tick(_tokens(a, b))
            if attempt.failed:
                self.token_budget.halve(larger.total_tokens)
                pieces = [split_batch(batch, self.token_budget.tokens) for batch in (a, b)]
                if a is b:
                    pairs += [(c, d) for x, c in enumerate(pieces[0]) for d in pieces[0][x:]]
                else:
                    pairs += product(pieces[0], pieces[1])
        return norms, products

    def _given(self, batch: Batch) -> dict[str, Any]:
        batch = batch.to(self.plan.device)
        offsets = {"cu_seqlens": batch.cu_samples} if batch.packed else {}
        return {"input_ids": batch.input_ids, "batch": batch} | offsets

    def rules(self) -> dict[str, tuple[str, ...]]:
        """The rules that served each parameter in `compute`, by the parameter's name."""
        return {
            name: tuple(rule.__name__.removesuffix("Call").lower() for rule in rules)
            for name, rules in self.plan.learned.served.items()
        }


def _tokens(a: Batch, b: Batch) -> int:
    """Tokens that the products of two batches run; a batch paired with itself runs once."""
    return a.total_tokens + (0 if a is b else b.total_tokens)


def _sample_nll(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """Each sample's share of the mean negative log-likelihood, from all logits."""
    batch: Batch = given["batch"]
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids, **without_cache(model)}
    kwargs |= positions(model, batch)
    with frequencies_at_first(model):
        answer = model(**kwargs)
    logits = logits_of(answer, model, batch.input_ids)
    logits = logits.flatten(0, 1)[batch.target_index]
    weighted = -batch.target_weight() * token_logprob(logits, batch)
    return batch.sample_sum(weighted, batch.target_mask())


def _stacked(by_name: Tensor | dict[str, Tensor]) -> Tensor:
    assert isinstance(by_name, dict)
    return torch.stack(list(by_name.values())).cpu()

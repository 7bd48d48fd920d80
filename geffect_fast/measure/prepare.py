"""Preparation: the work that is done once, before anything is measured.

For every command, `prepare` reads and tokenises rows and checks the model. For a profile,
`Schedule` also chooses engine, layout and passes over the data.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.capture.compat import (
    check_finite,
    check_is_model,
    is_sharded,
    made_for_positions,
    mixing_module,
    still_up_to,
    table_of_positions,
    vocabulary_size,
)
from geffect_fast.data import (
    Layout,
    SampleSet,
    check_vocabulary,
    estimate_token_budget,
    make_batches,
    tokenize_rows,
)
from geffect_fast.data.batch import Batch, Role
from geffect_fast.data.samples import check_positions
from geffect_fast.data.tokenize import TEXT_WINDOW
from geffect_fast.engines.batches import (
    DataPass,
    TokenBudget,
    dealt,
    mixture_of,
    passes_for,
)
from geffect_fast.engines.choice import Choice, choose_engine
from geffect_fast.engines.forward_check import forward_mode_problem
from geffect_fast.engines.known_models import choose_layout, own_loss
from geffect_fast.engines.layout import check_reference, longest_sequence
from geffect_fast.engines.model_outputs import splits_attention
from geffect_fast.errors import GEffectWarning, InputError, UnsupportedModelError
from geffect_fast.measure.memory import within_budget
from geffect_fast.measure.models import load_like
from geffect_fast.measure.rounding import HALF, RoundingCheck
from geffect_fast.measure.sources import (
    Sources,
    needs_of,
    parts_of,
    read_sources,
    reads_alternatives,
)
from geffect_fast.objectives import Objective
from geffect_fast.objectives.base import REFERENCE_NEEDS
from geffect_fast.ranks import here
from geffect_fast.results.axes import Resolution
from geffect_fast.results.dataset import digests
from geffect_fast.results.groups import checked_blocks
from geffect_fast.results.risk_rows import RowValues
from geffect_fast.results.risks import UNLEARN
from geffect_fast.settings import Measuring, Reading

ReadingT = TypeVar("ReadingT", bound=Reading)


@dataclass(frozen=True)
class Prepared(Generic[ReadingT]):
    """A model, its data and objectives, read, tokenised and checked.

    Attributes:
        model, tokenizer: as given.
        settings: how rows were read, and the command's other settings.
        objectives: each once.
        sets: tokenised data sets by name, as in `Sources`.
        reference: what NPO-like objectives compare with; None: the model itself.
    """

    model: nn.Module
    tokenizer: Any
    settings: ReadingT
    objectives: list[Objective]
    sets: dict[str, SampleSet]
    reference: nn.Module | None = field(repr=False)

    @functools.cached_property
    def parts(self) -> list[Objective]:
        """The elementary objectives that the given ones are weighted sums of, each once.

        Effects are linear in the objective, so these suffice.
        """
        return parts_of(self.objectives)

    @property
    def compares(self) -> bool:
        """Whether a part compares with a reference model."""
        return bool(REFERENCE_NEEDS & needs_of(self.parts))

    def attributes(self) -> dict[str, Any]:
        """Attributes of a result about its objectives and rows."""
        return {
            "n_forget": len(self.sets["forget"]),
            "n_retain": len(self.sets["retain"]),
            "date": self.settings.date,
            "digests": json.dumps(digests(self.sets)),
            "objectives": json.dumps(
                [{"name": o.name, "parameters": o.parameters()} for o in self.objectives]
            ),
        }

    def arguments_in_words(self) -> dict[str, Any]:
        """Descriptions of all arguments that must be the same on all ranks, by argument name."""
        rows = {
            name: f"{len(self.sets[name])} rows of digest {found}"
            for name, found in digests(self.sets).items()
        }
        return {
            "objectives": ", ".join(map(str, self.objectives)),
            "probes": ", ".join(rows),
            **rows,
            "reference_model": "none" if self.reference is None else type(self.reference).__name__,
            **{name: str(value) for name, value in self.settings},
        }

    def of_rows(self, rows: Mapping[str, Sequence[int]]) -> Prepared[ReadingT]:
        """This preparation, reduced to some rows of each set."""
        sets = {name: self.sets[name].part(chosen) for name, chosen in rows.items()}
        return replace(self, sets=sets)


def prepare(
    model: nn.Module,
    tokenizer: Any,
    sources: Sources,
    objectives: Sequence[Objective],
    settings: ReadingT,
    reference_model: nn.Module | str | Path | None = None,
) -> Prepared[ReadingT]:
    """Read, tokenise and check what a command measures.

    Args:
        model: a causal language model of transformers.
        tokenizer: of transformers; None for samples that are tokenised already.
        sources: data sets, read or not.
        objectives: each once, as `resolved_list` returns them.
        settings: how rows become tokens, and the command's other settings.
        reference_model: a model or the folder of one; loaded where an objective compares with it.

    Raises:
        InputError: unusable data, model or reference, in one line.
        NonFiniteError: a weight is not finite.
        UnsupportedModelError: a sample's sequences cannot share a forward of the model.
    """
    sources = read_sources(sources, objectives, settings.data_format)
    parts = parts_of(objectives)
    with_alternatives = reads_alternatives(parts)
    first = next(iter(sources.sets))
    sets = {
        name: rows
        if isinstance(rows, SampleSet)
        else tokenize_rows(
            rows,
            tokenizer,
            name=name,
            refusals=sources.refusals if name == first and with_alternatives else None,
            template=settings.template,
            max_length=settings.max_length,
            date=settings.date,
            n_positions=table_of_positions(model),
            window=min(TEXT_WINDOW, made_for_positions(model) or TEXT_WINDOW),
        )
        for name, rows in sources.sets.items()
    }
    check_model(model, sets)
    if with_alternatives:
        _check_pairs(model, sets[first])
    reference = None
    if needs_of(parts) & REFERENCE_NEEDS and reference_model not in (None, model):
        reference = _reference(reference_model, model, settings.trust_remote_code)
        check_model(reference, sets, "reference_model")
    return Prepared(model, tokenizer, settings, list(objectives), sets, reference)


def _reference(
    source: nn.Module | str | Path, model: nn.Module, trust_remote_code: bool
) -> nn.Module:
    """The reference model; a folder is loaded in the model's precision and on its device."""
    if isinstance(source, nn.Module):
        why = mixing_module(source)
        if why is not None:
            raise InputError(f"reference_model: {why}")
        if is_sharded(source) and not is_sharded(model):
            raise InputError(
                "reference_model: FSDP shares it out, and not the model; give both shared out, or "
                "it whole"
            )
        return source
    return load_like(source, model, "reference", trust_remote_code)


def check_model(model: nn.Module, sets: Mapping[str, SampleSet], what: str = "model") -> None:
    """Refuse a model that holds NaN, is not a decoder alone, or is too small for the data sets.

    A model is too small if its vocabulary lacks a token, or a sample is longer than its table of
    positions.

    Raises:
        InputError: the model is unusable, in one line.
        NonFiniteError: a weight is not finite.
    """
    check_is_model(model, what)
    check_finite(model, what)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True:
        raise InputError(
            f"{what}: {type(model).__name__} reads the question by an encoder and the answer by a "
            "decoder; give a causal language model, which reads both as one text"
        )
    vocab_size = vocabulary_size(model)
    if vocab_size is not None:
        for sample_set in sets.values():
            check_vocabulary(sample_set, vocab_size, what)
    n_positions, table = made_for_positions(model), table_of_positions(model)
    if table is not None:
        for sample_set in sets.values():
            check_positions(sample_set, table, what)
    elif n_positions is not None:
        _tell_of_long_rows(sets, n_positions, what)


def _check_pairs(model: nn.Module, sample_set: SampleSet) -> None:
    """Refuse samples whose answer and alternatives would need different rotary frequencies.

    The sequences of a sample share a forward, in which the shorter ones are extended to the
    longest. Some models' rotary frequencies depend on the length beyond some number of tokens.

    Raises:
        UnsupportedModelError: naming the first such row.
    """
    still = still_up_to(model)
    for sample in sample_set.samples if still < math.inf else ():
        lengths = {len(q) for sequences in sample.sequences().values() for q in sequences}
        if len(lengths) > 1 and max(lengths) > still:
            raise UnsupportedModelError(
                f"{sample.place(sample_set.name)}: its answer and alternatives have "
                f"{min(lengths)} to {max(lengths)} tokens, and beyond {still:.0f} the model's "
                f"rotary frequencies follow the length; give max_length={still:.0f}, or leave out "
                "objectives that read alternatives"
            )


def _tell_of_long_rows(sets: Mapping[str, SampleSet], n_positions: int, what: str) -> None:
    """Warn of the first row that has more tokens than a model was made for."""
    for sample_set in sets.values():
        for sample in sample_set.samples:
            longest = max(len(q) for qs in sample.sequences().values() for q in qs)
            if longest > n_positions:
                warnings.warn(
                    f"{sample.place(sample_set.name)} has {longest} tokens, and the "
                    f"{what} was made for {n_positions} positions; what it computes beyond them "
                    "may mean little",
                    GEffectWarning,
                    stacklevel=2,
                )
                return


class Schedule:
    """The plan of a profile, independent of the weights: engine, layout, passes over the data.

    Args:
        prepared: the model, its data and objectives, and what to measure.
        plan: of the model.

    Attributes:
        plan: as given.
        ranks: the ranks that share the batches of `passes` and `risk_passes`.
        sets: the data sets, by name.
        objectives: the K objectives.
        parts: the elementary objectives that `objectives` are weighted sums of.
        mixture: `(K, n_parts)`, how often each part counts in each objective.
        resolution: the axes of a result.
        risk_sets: the data set of each of the M risks, by its name along the axis `risk`.
        choice: the engine.
        layout: of batches.
        norms: whether the reverse engine forms whole gradients.
        own_loss: how the model's own loss differs from the risk; None: it does not.
        token_budget: of a batch.
        passes: over the objectives' data.
        one_row: passes over the first row of each data set that objectives read.
        risk_passes: over the risks' data, one each.
        first_risk_row: a pass over the first row of the first risk.
        rounding: the check of how far effects of a 16-bit model can be trusted; None for models of
            other precisions, and for models that ranks share out.
        attributes: of results.

    Raises:
        InputError: settings do not go together, or the reference does not go with the model.
        UnsupportedModelError: the model's samples cannot be told apart, or its tangents not passed.
    """

    def __init__(self, prepared: Prepared[Measuring], plan: Plan) -> None:
        settings, sets = prepared.settings, prepared.sets
        if not {"parameter", "group"} & set(settings.resolve) and settings.groups:
            raise InputError("groups: goes with resolve by 'group' or 'parameter'; leave it out")
        self.plan, self.sets, self.ranks = plan, sets, here()
        self.objectives, self.parts = prepared.objectives, prepared.parts
        self.mixture = mixture_of(self.objectives, self.parts)
        uses_retain = any(part.on == "retain" for part in self.parts)
        self.resolution = Resolution(
            settings.resolve,
            list(plan.parameters),
            {name: sets[name] for name in ("forget", "retain")[: 1 + uses_retain]},
            reads_alternatives(self.parts),
            checked_blocks(settings.groups or None, list(plan.parameters)),
        )
        self.risk_sets = {UNLEARN: sets["forget"]}
        self.risk_sets |= {name: rows for name, rows in sets.items() if name != "forget"}
        self.risk_names = list(self.risk_sets)
        self.token_budget = TokenBudget(settings.token_budget or 1)
        self._look_at_the_model(prepared)
        if settings.token_budget is None:
            self.token_budget.tokens = min(self.ranks.meet(self._tokens_that_fit()))
        # Engine and layout depend on trials and on free memory, in which ranks may differ.
        self.ranks.check_same({"engine": self.choice.engine, "layout": self.layout})
        self._divide_into_batches(settings)
        self.attributes: dict[str, Any] = {
            "engine": self.choice.engine,
            "engine_reason": self.choice.reason,
            "layout": self.layout,
            "reduction": settings.reduction,
            "risk": str(settings.risk_objective),
            **prepared.attributes(),
        }
        if self.own_loss is not None:
            self.attributes |= self.own_loss.attributes()

    def _look_at_the_model(self, prepared: Prepared[Measuring]) -> None:
        """Choose engine, layout and `norms`, and compare the model's own loss with the risk.

        The reference is checked to go with the model here too.
        """
        settings, plan, forget = prepared.settings, self.plan, self.sets["forget"]
        self.choice = choose_engine(
            settings.engine,
            settings.resolve,
            settings.norms,
            n_risks=len(self.risk_names),
            n_parts=len(self.parts),
            shares=plan.product_shares(self.resolution.columns()[1]),
        )
        longest = max(map(longest_sequence, self.sets.values()))
        with within_budget(self.token_budget, one_sample=True):
            try:
                self.layout: Layout = choose_layout(plan, forget, longest)
            except UnsupportedModelError:
                # Whole gradients and forward passes need no shares of samples, only that no sample
                # depends on another.
                if self.resolution.per_sample and self.choice.engine == "reverse":
                    raise
                self.layout = "single"
            self.own_loss = own_loss(plan, forget)
        if self.choice.engine == "forward":
            problem = forward_mode_problem(plan, forget, self.layout)
            if problem is not None:
                if settings.engine == "forward" or self.resolution.within is not None:
                    raise UnsupportedModelError(
                        f"engine forward: {problem}; use engine='reverse', without 'token'"
                    )
                self.choice = Choice("reverse", problem)
        by_reverse = self.choice.engine == "reverse"
        self.norms = by_reverse if settings.norms is None else settings.norms
        if prepared.reference is not None:
            with within_budget(self.token_budget, one_sample=True):
                check_reference(prepared.reference, self.layout, forget, longest)

    def _tokens_that_fit(self) -> int:
        """Tokens of a batch, from the memory that a token takes and the memory that is free."""
        model, layout = self.plan.model, self.layout
        forward = self.choice.engine == "forward"
        whole = not forward and (self.norms or not self.resolution.per_sample)
        needs = needs_of(self.parts)
        (largest, *_) = make_batches(
            self.sets["forget"], ("answer",), token_budget=2**62, layout=layout
        )
        read = Counter((part.on, frozenset(part.roles)) for part in self.parts)
        predicted = [
            each.totals().n_targets["answer"] / sum(len(s.answer) for s in each.samples)
            for each in self.sets.values()
        ]
        n_trained = sum(p.numel() for p in self.plan.held.values())
        if self.plan.shards is not None:  # the blocks that a forward has whole at a time
            at_once = self.plan.shards.at_once(list(self.plan.parameters.values()))
            n_trained += max(sum(p.numel() for p in some) for some in at_once)
        return estimate_token_budget(
            model,
            n_directions=len(self.risk_names),
            n_gradients=len(self.parts) if whole else 0,
            shared=not forward and max(read.values()) > 1,
            forward=forward,
            logits=not {"logits", "reference_logits"}.isdisjoint(needs),
            predicted=max(predicted),
            by_sample=layout != "packed" or splits_attention(model, largest),
            n_trained=n_trained,
        )

    def _divide_into_batches(self, settings: Measuring) -> None:
        """Make the passes over the objectives' and the risks' data, and the passes for checks."""
        sets, risk = self.sets, settings.risk_objective
        batches_of = partial(
            make_batches,
            token_budget=self.token_budget.tokens,
            reduction=settings.reduction,
            layout=self.layout,
        )

        def for_ranks(rows: SampleSet, roles: tuple[Role, ...]) -> list[Batch]:
            """Batches small enough that every rank gets one, as far as there are rows."""
            batches, size = batches_of(rows, roles), self.ranks.size
            if size == 1:
                return batches
            longest = max(int(batch.cu_samples.diff().max()) for batch in batches)
            share = -(-sum(batch.total_tokens for batch in batches) // size) + longest - 1
            budget = min(self.token_budget.tokens, share)
            return batches_of(rows, roles, token_budget=budget)

        def passes_over(
            sets: Mapping[str, SampleSet], allowed: TokenBudget | None = None
        ) -> list[DataPass]:
            offsets = {"forget": 0, "retain": len(sets["forget"])}
            cut = batches_of if allowed is None else for_ranks
            return passes_for(
                self.parts, lambda name, roles: cut(sets[name], roles), offsets, allowed
            )

        share_out = partial(dealt, ranks=self.ranks, in_step=self.plan.shards is not None)
        self.passes = [share_out(each) for each in passes_over(sets, self.token_budget)]
        self.one_row = passes_over({name: rows.part([0]) for name, rows in sets.items()})
        self.risk_passes = [
            share_out(
                DataPass(for_ranks(rows, risk.roles), {m: risk}, token_budget=self.token_budget)
            )
            for m, rows in enumerate(self.risk_sets.values())
        ]
        first = make_batches(
            sets["forget"].part([0]), risk.roles, token_budget=1, layout=self.layout
        )
        self.first_risk_row = DataPass(first, {0: risk})
        self.rounding = None
        in_16_bits = any(p.dtype in HALF for p in self.plan.model.parameters())
        if in_16_bits and self.plan.shards is None:
            self.rounding = RoundingCheck.of(
                self.choice.engine, self.resolution, self.mixture, passes_over
            )

    def add_up_parts(self, products: Sequence[Tensor]) -> None:
        """Replace products by their sums over ranks, in place, where ranks share out the model."""
        if self.plan.shards is not None:
            self.plan.shards.add_up(products)

    def watched_rows(self, diagonal: Mapping[str, Tensor] | None) -> RowValues | None:
        """A collector of what every row adds to the risks; None where rows are not told apart.

        The collector watches the passes in which the risks' gradients are found.

        Args:
            diagonal: of the metric that effects are measured in, by parameter; None: plain.
        """
        if "sample" not in self.resolution.axes:
            return None
        sizes = {name: len(rows) for name, rows in self.risk_sets.items()}
        return RowValues(sizes, adds_up=self.attributes["reduction"] == "sum", diagonal=diagonal)

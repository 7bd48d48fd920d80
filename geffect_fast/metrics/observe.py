"""Observation of a model for metrics: everything they need of data sets, each thing once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from geffect_fast.capture.compat import is_sharded
from geffect_fast.data import IGNORE, Layout
from geffect_fast.data.row_kinds import row_place
from geffect_fast.data.samples import TokenSequence as Tokens
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.metrics.generation import continuations
from geffect_fast.metrics.gradient_norms import NORM_NEEDS, gradient_norms
from geffect_fast.metrics.observed import Observed, Scored
from geffect_fast.metrics.rows import (
    EXAMPLES,
    FIELDS,
    DataRows,
    few_shot_prompts,
    to_be_written,
)
from geffect_fast.metrics.scored import Tick, forward_layout, score
from geffect_fast.ranks import ALONE, Ranks


def observe(
    model: nn.Module,
    sets: Mapping[str, DataRows],
    needs: Mapping[str, Collection[str]],
    tokenizer: Any,
    budget: TokenBudget,
    max_new_tokens: int,
    *,
    lengths: Mapping[str, Collection[int]] | None = None,
    what: str = "model",
    tick: Tick = lambda _: None,
    ranks: Ranks = ALONE,
) -> dict[str, Observed]:
    """Observe a model on data sets, by one teacher-forced pass over all of their sequences.

    Generation and gradients, where metrics need them, come after that pass.

    Args:
        model: a model in eval mode.
        sets: the data sets by name.
        needs: the needs of the metrics that read each set, by its name.
        tokenizer: decodes tokens into text; None where no metric reads text.
        budget: the tokens of a batch.
        max_new_tokens: the most tokens of a text in `Observed.continuations`.
        lengths: by set, every number of tokens for which `Observed.written` has an entry.
        what: the model's name in messages.
        tick: called with the number of tokens that are done.
        ranks: the ranks that share out the rows; each rank gets all observations.

    Raises:
        NonFiniteError, UnsupportedModelError, InputError: errors of the passes.
    """
    sequences: list[Tokens] = []
    places: list[str] = []
    ends: dict[tuple[str, str, int], slice] = {}
    for name, rows in sets.items():
        for column, of in _columns(rows, needs[name]).items():
            for row, each in enumerate(of):
                listed = each if isinstance(each, list) else [each]
                ends[name, column, row] = slice(len(sequences), len(sequences) + len(listed))
                sequences += listed
                places += [row_place(name, row)] * len(listed)
    found = {name: Observed(name, kind=rows.kind) for name, rows in sets.items()}
    layout = forward_layout(model, sequences)
    if is_sharded(model):
        ranks.check_same({"layout": layout})
    distribution = any("distribution" in of for of in needs.values())
    scored = score(
        model,
        sequences,
        places,
        budget,
        layout,
        distribution=distribution,
        what=what,
        tick=tick,
        ranks=ranks,
    )
    for name, rows in sets.items():
        columns: dict[str, Any] = {}
        for column, of in _columns(rows, needs[name]).items():
            pieces = [scored[ends[name, column, row]] for row in range(len(of))]
            several = column in ("perturbed", "choices")
            columns[column] = pieces if several else [piece[0] for piece in pieces]
        if "texts" in needs[name]:
            columns["texts"] = rows.texts or _decoded(rows, tokenizer)
        found[name] = replace(found[name], **columns, right=rows.right)
    for name, rows in sets.items():
        found[name] = replace(
            found[name],
            **_written(
                model,
                rows,
                sets.get(f"{name}{EXAMPLES}"),
                needs[name],
                tokenizer,
                budget,
                max_new_tokens,
                set((lengths or {}).get(name, ())),
                ranks,
            ),
            norms=_norms(model, rows, needs[name], budget, layout, tick, ranks),
        )
    return found


def answers_scored(
    model: nn.Module, sets: Mapping[str, DataRows], budget: TokenBudget, what: str, ranks: Ranks
) -> dict[str, list[Scored]]:
    """Scores of the sets' answers by a further model, by set."""
    needs = {name: {"answers"} for name in sets}
    seen = observe(model, sets, needs, None, budget, 1, what=what, ranks=ranks)
    return {name: of.answers or [] for name, of in seen.items()}


def n_tokens(sets: Mapping[str, DataRows], needs: Mapping[str, Collection[str]]) -> int:
    """Number of tokens of all sequences that a pass scores; equal sequences count every time."""
    return sum(
        len(sequence)
        for name, rows in sets.items()
        for of in _columns(rows, needs[name]).values()
        for each in of
        for sequence in (each if isinstance(each, list) else [each])
    )


def _columns(rows: DataRows, needs: Collection[str]) -> dict[str, list[Any]]:
    """The sequences that these needs ask to score, row by row, for each column of `Observed`."""
    found: dict[str, list[Any]] = {"answers": [s.answer for s in rows.answers.samples]}
    for need in FIELDS:
        of = getattr(rows, need)
        if need in needs and of is not None:
            found[need] = of
    return found


def _decoded(rows: DataRows, tokenizer: Any) -> list[str]:
    """The rows' label tokens, decoded."""
    labels = [sample.answer.labels for sample in rows.answers.samples]
    of = [each[each != IGNORE].tolist() for each in labels]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in of]


def _written(
    model: nn.Module,
    rows: DataRows,
    examples: DataRows | None,
    needs: Collection[str],
    tokenizer: Any,
    budget: TokenBudget,
    max_new_tokens: int,
    lengths: set[int],
    ranks: Ranks,
) -> dict[str, Any]:
    """Columns of `Observed` with continuations of the rows' prompts, and the data's own texts.

    Only the longest continuations are generated: a shorter greedy one is the beginning of a longer
    one. Where examples are given, `written` continues prompts with the examples, and
    `continuations` continues the rows' own prompts.
    """
    own = {max_new_tokens} if "continuations" in needs else set()
    if not lengths | own:
        return {}
    prompts, there, cut = zip(
        *(to_be_written(sample.answer, rows.kind) for sample in rows.answers.samples), strict=True
    )
    special = set(tokenizer.all_special_ids)
    stops = {int(ids[-1]) for ids in there} & special
    stops |= {tokenizer.eos_token_id} - {None}

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def truths(n: int) -> list[str]:
        return [
            text(ids.tolist()[: n if is_cut else None])
            if is_cut or rows.texts is None
            else rows.texts[row]
            for row, (ids, is_cut) in enumerate(zip(there, cut, strict=True))
        ]

    def written(after: Sequence[Tensor], wanted: set[int]) -> dict[int, Any]:
        most = max(wanted, default=0)
        ids = continuations(model, after, stops, most, budget, ranks) if wanted else []
        return {n: ([text(each[:n]) for each in ids], truths(n)) for n in wanted}

    if examples is None:
        found = written(prompts, lengths | own)
    else:
        found = written(few_shot_prompts(rows, examples, tokenizer), lengths)
    columns: dict[str, Any] = {"written": found}
    if own:
        last = found if examples is None else written(prompts, own)
        columns["continuations"], columns["truths"] = last[max_new_tokens]
    return columns


def _norms(
    model: nn.Module,
    rows: DataRows,
    needs: Collection[str],
    budget: TokenBudget,
    layout: Layout,
    tick: Tick,
    ranks: Ranks,
) -> dict[str, Any]:
    """Norms of the rows' gradients, by need; empty where no metric reads them."""
    wanted = [need for need in NORM_NEEDS if need in needs]
    if not wanted:
        return {}
    answers = [sample.answer for sample in rows.answers.samples]
    return gradient_norms(model, answers, wanted, budget, layout, tick, ranks)

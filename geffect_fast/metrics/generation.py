"""Greedy continuations of prompts by transformers' `generate`, without the model's own settings.

Prompts of one length share a batch. Nothing is padded, so a row gets the continuation that it would
get by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import fsdp_groups, is_sharded, made_for_positions
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.errors import GEffectWarning, InputError, UnsupportedModelError
from geffect_fast.ranks import ALONE, Ranks
from geffect_fast.trying import no_memory

Key = tuple[int, ...]
"""A prompt's tokens."""

_SETTINGS = "generation_config"

_KEPT = 8
"""Tokens of a batch in generation, for each token of a batch in training: generation keeps keys and
values alone, and a backward needs some twenty vectors for each token and layer."""


def continuations(
    model: nn.Module,
    prompts: Sequence[Tensor],
    ends: set[int],
    max_new_tokens: int,
    budget: TokenBudget,
    ranks: Ranks = ALONE,
) -> list[list[int]]:
    """Greedy continuations, without the token that ends them; equal prompts are continued once.

    Args:
        model: a model of transformers, in eval mode; its own settings of generation (penalties,
            sampling) are not used.
        prompts: token ids, `(length,)` each.
        ends: ids of the tokens that end a row.
        max_new_tokens: the most tokens that a row gets.
        budget: the tokens that a batch may hold in a forward and backward. Where memory runs out,
            half as many rows are written at a time; where ranks keep step, that is an error.
        ranks: the ranks that share out the prompts.

    Raises:
        UnsupportedModelError: the model cannot generate.
        InputError: a prompt and its continuation are longer than the model's positions.
    """
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot generate; give a model of transformers, or leave out "
            "metrics of what it writes (rouge_l, ...)"
        )
    keys = [tuple(prompt.tolist()) for prompt in prompts]
    longest_first = sorted(dict.fromkeys(keys), key=len, reverse=True)
    found: dict[Key, list[int]] = {}

    def next_of(waiting: list[Key], most: int) -> list[Key]:
        """The prompts of the next batch, all of one length."""
        length = len(waiting[0])
        fit = max(_KEPT * budget.tokens // (length + max_new_tokens), 1)
        return [key for key in waiting[: min(fit, most)] if len(key) == length]

    if is_sharded(model):
        for batch in _in_step(longest_first, next_of, ranks):
            new = _greedy(model, torch.tensor(batch), ends, max_new_tokens, in_step=True)
            found |= zip(batch, (_until(row, ends) for row in new.tolist()), strict=True)
    waiting = [] if is_sharded(model) else ranks.dealt(longest_first)[0]
    most = len(waiting)
    while waiting:
        batch = next_of(waiting, most)
        try:
            new = _greedy(model, torch.tensor(batch), ends, max_new_tokens)
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error) or len(batch) == 1:
                raise
            most = len(batch) // 2
            warnings.warn(
                f"out of memory where {len(batch)} rows are written at a time; going on with "
                f"{most}",
                GEffectWarning,
                stacklevel=2,
            )
            continue
        found |= zip(batch, (_until(row, ends) for row in new.tolist()), strict=True)
        waiting = waiting[len(batch) :]
    found = ranks.united(found)
    return [found[key] for key in keys]


def _in_step(
    prompts: list[Key], next_of: Callable[[list[Key], int], list[Key]], ranks: Ranks
) -> list[list[Key]]:
    """This rank's batches, the same number on every rank: some ranks run their first one again."""
    batches: list[list[Key]] = []
    most = -(-len(prompts) // ranks.size)
    while prompts:
        batches.append(next_of(prompts, most))
        prompts = prompts[len(batches[-1]) :]
    return ranks.dealt(batches, in_step=True)[0]


@torch.no_grad()
def _greedy(
    model: Any, ids: Tensor, ends: set[int], max_new_tokens: int, *, in_step: bool = False
) -> Tensor:
    """The new tokens of prompts of one length, `(n, at most max_new_tokens)`.

    Args:
        model: a model of transformers.
        ids: the prompts, `(n, length)`.
        ends: ids of the tokens that end a row.
        max_new_tokens: the most new tokens of a row.
        in_step: whether every rank goes on until the rows of all ranks have ended.
    """
    positions = made_for_positions(model)
    if positions is not None and positions < ids.shape[1] + max_new_tokens:
        raise InputError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {ids.shape[1]} tokens are more "
            f"than the model's {positions} positions; give at most {positions - ids.shape[1]}"
            if ids.shape[1] < positions
            else f"a prompt of {ids.shape[1]} tokens leaves no room in the model's {positions} "
            "positions; shorten or drop the row"
        )
    ids = ids.to(next(model.parameters()).device)
    with _greedy_settings(model, ends, max_new_tokens):
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if in_step:
            given["synced_gpus"] = True
            fsdp_groups(model)[0].unshard()  # an adapter calls the inner model, not its root
        made = model.generate(**given)
    return made[:, ids.shape[1] :].cpu()


@contextmanager
def _greedy_settings(model: Any, ends: set[int], max_new_tokens: int) -> Iterator[None]:
    """Replace the model's settings of generation by plain greedy ones, inside the context."""
    from transformers import GenerationConfig

    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    # An adapter hands its own settings to the inner model, so both are replaced.
    held = [(m, vars(m)[_SETTINGS]) for m in model.modules() if _SETTINGS in vars(m)]
    try:
        for module, _ in held:
            setattr(module, _SETTINGS, plain)
        yield
    finally:
        for module, before in held:
            setattr(module, _SETTINGS, before)


def _until(row: list[int], ends: set[int]) -> list[int]:
    """A row's tokens before the first one that ends it."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]

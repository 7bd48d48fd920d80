"""An unlearned model mixed with the one it was made from, in memory:

    theta(alpha) = (1 - alpha) theta_original + alpha theta_unlearned

for parameters and buffers. An adapter adds `s B A`, which is linear in `B`, but not in `A` and `B`
together. So only the `B`s of adapters are scaled, which is exact:

    W + alpha s B A                              with an adapter on the original
    W + (1 - alpha) s1 B1 A1 + alpha s2 B2 A2    with two adapters on one base

Means of the `A`s and of the `B`s would be another model.

Where ranks share out the models, each rank mixes its own parts. FSDP makes no copies of a model, so
a model that was given is written to, and put back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import check_finite, is_sharded, put_to_rest
from geffect_fast.errors import InputError
from geffect_fast.measure.mixed_adapters import (
    check_adapter,
    is_adapter,
    pair_adapter,
    pair_adapters,
    savable_parameters,
    undo_of_adapters,
)
from geffect_fast.measure.mixed_tensors import check_same_config, equal, pair_models
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.measure.saved_adapters import check_saved, save_adapter, save_sum
from geffect_fast.measure.shared_out import whole_on_first
from geffect_fast.ranks import here


class Mixture:
    """Mixtures of an original and an unlearned model, one at a time, in one working model.

    Beside the working model only one mixed tensor at a time is held, in fp32 or wider.

    Args:
        original: a causal language model, or one with an adapter.
        unlearned: a model of the same structure, or an adapter on the original or on its base.
        working: a copy of the original, which is written to. With adapters another working model
            is made, which shares the base's tensors with this copy, so only the adapters' weights
            and the modules that they replace take further memory. Where ranks share out the models
            it is the original itself; with an adapter on the original, the unlearned model is
            written to instead.
        what: the unlearned model's name in messages.

    Raises:
        InputError: the two models cannot be mixed, or are the same.
        NonFiniteError: a weight is not finite; it is named.
    """

    def __init__(
        self, original: nn.Module, unlearned: nn.Module, working: nn.Module, what: str
    ) -> None:
        if unlearned is original:
            raise InputError(f"{what}: it is the original itself; give an unlearned model")
        check_finite(unlearned, what)
        if is_sharded(unlearned) != is_sharded(original):
            raise InputError(
                f"{what}: FSDP shares out one of the two models that are mixed, and not the other; "
                "give both alike"
            )
        for model in (original, unlearned):
            put_to_rest(model)
        # Of models in parts: the `alpha` at which the model that is written to is as it was given,
        # and the function that takes an added adapter out of it.
        self._rests_at: float | None = None
        self._undo: Callable[[], None] = lambda: None
        adapted = is_adapter(original), is_adapter(unlearned)
        self._second: str | None = None
        if adapted == (False, False):
            self.model = working
            self._tensors = pair_models(original, unlearned, working, what)
            if is_sharded(original):
                self._rests_at = 0.0
        elif adapted == (False, True):
            check_adapter(unlearned, what)
            adapter: Any = unlearned
            check_same_config(original, adapter.get_base_model(), what)
            self.model, self._tensors = pair_adapter(original, unlearned, working, what)
            if is_sharded(original):
                self._rests_at, self._undo = 1.0, undo_of_adapters(unlearned)
        elif adapted == (True, True):
            self.model, self._second, self._tensors, undo = pair_adapters(
                original, unlearned, working, what
            )
            if is_sharded(original):
                self._rests_at, self._undo = 0.0, undo
        else:
            raise InputError(
                f"{what}: it is a whole model, and the original has an adapter; merge the adapter "
                "into its base (merge_and_unload) and give the merged model as the original"
            )
        with ExitStack() as on_error:
            on_error.callback(self.put_back)
            if all(here().meet(all(equal(each.start, each.end) for each in self._tensors))):
                raise InputError(
                    f"{what}: its weights are the original's, so there is nothing to mix; give a "
                    "model that unlearning has changed"
                )
            on_error.pop_all()

    @torch.no_grad()
    def at(self, alpha: float) -> nn.Module:
        """The working model at `alpha`.

        At 0 it is bit by bit the original, and at 1 the unlearned model.
        """
        for each in self._tensors:
            each.target.copy_(mixed(each.start, each.end, alpha))
        return self.model

    @property
    def is_whole_in_part(self) -> bool:
        """Whether ranks share out the model while each holds a second adapter whole."""
        return self._second is not None and is_sharded(self.model)

    def put_back(self) -> None:
        """Restore a model in parts that was written to. The mixture must not be used afterwards."""
        put_to_rest(self.model)
        if self._rests_at is not None:
            self.at(self._rests_at)
        self._undo()

    def save(self, folder: Path | None, tokenizer: Any = None) -> None:
        """Write the mixture as it is now into a folder, in the form of the unlearned model.

        Args:
            folder: None on ranks that write nothing; they contribute their parts all the same.
            tokenizer: saved beside the model; None: none is saved.

        Raises:
            InputError: the saved adapter adds something else than the one in memory.
        """
        model: Any = self.model
        whole: Any = nullcontext()
        if is_sharded(model):
            saved = savable_parameters(model) if is_adapter(model) else model.parameters()
            whole = whole_on_first(model, saved)
        with whole, quiet_transformers():
            if folder is None:
                return
            if not is_adapter(model):
                model.save_pretrained(folder)
            else:
                if self._second is None:
                    save_adapter(model, folder, *model.peft_config)
                else:
                    save_sum(model, folder)
                check_saved(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)


def mixed(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) start + alpha end` in fp32 or wider; exact where `start` and `end` are equal.

    At 0 the result is `start` itself and at 1 `end` itself. Tensors of whole numbers, which are
    equal at both ends, stay as they are.
    """
    if alpha in (0, 1) or not start.is_floating_point():
        return end if alpha == 1 else start
    wide = torch.promote_types(start.dtype, torch.float32)
    return torch.lerp(start.to(wide), end.to(start.device, wide), alpha)

"""A model class of lm-evaluation-harness for several ranks, which share out the requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from geffect_fast.capture.compat import fsdp_groups, is_sharded
from geffect_fast.ranks import here


def on_ranks(base: Any) -> Any:
    """Make a subclass of `HFLM` in which each of `n` ranks answers every `n`-th request.

    The requests are the same on all ranks, and each rank has all answers in the end. Where ranks
    share out the model too, every forward of one rank needs a forward of all others. So before
    every batch the ranks tell each other whether they have one, and a rank that has none runs a
    single token.

    Args:
        base: the class `HFLM`, which lies in a package that need not be installed.
    """

    class OnRanks(base):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self._ranks = here()
            self._in_step = self._ranks.size > 1 and is_sharded(self.model)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **how: Any) -> list[Any]:
            answers = super()._loglikelihood_tokens

            def nothing() -> None:
                super(OnRanks, self)._model_call(self._one_token())

            return self._shared(requests, lambda own: answers(own, *args, **how), nothing)

        def generate_until(self, requests: Any, *args: Any, **how: Any) -> list[str]:
            answers = super().generate_until
            if any(request.args[1].get("do_sample") for request in requests):
                return answers(requests, *args, **how)  # sampled tokens depend on the batches

            def nothing() -> None:
                one = self._one_token()
                self._generated(
                    context=one, attention_mask=torch.ones_like(one), stop=[], max_length=2
                )

            return self._shared(requests, lambda own: answers(own, *args, **how), nothing)

        def _shared(
            self,
            requests: Sequence[Any],
            answers: Callable[[Sequence[Any]], list[Any]],
            nothing: Callable[[], None],
        ) -> list[Any]:
            own, _ = self._ranks.dealt(range(len(requests)))
            found = answers([requests[i] for i in own]) if own else []
            while self._in_step and any(self._ranks.meet(False)):
                nothing()
            every = self._ranks.united(dict(zip(own, found, strict=True)))
            return [every[i] for i in range(len(requests))]

        def _one_token(self) -> torch.Tensor:
            return torch.tensor([[self.prefix_token_id]], device=self.device)

        def _model_call(self, *args: Any, **how: Any) -> Any:
            if self._in_step:
                self._ranks.meet(True)
            return super()._model_call(*args, **how)

        def _model_generate(self, **given: Any) -> Any:
            if self._in_step:
                self._ranks.meet(True)
            return self._generated(**given)

        def _generated(self, **given: Any) -> Any:
            if self._in_step:
                given["synced_gpus"] = True
                fsdp_groups(self.model)[0].unshard()  # an adapter calls the inner model directly
            return super()._model_generate(**given)

    return OnRanks

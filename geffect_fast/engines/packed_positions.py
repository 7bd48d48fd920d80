"""What transformers would read off the device before a model's first layer, told by the batch.

It finds out from `position_ids` whether a row holds several sequences, and from `input_ids` whether
there is padding to warn of; each waits for the device, once a forward. The batch knows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor

from geffect_fast.data.batch import Batch

_BATCH: ContextVar[Batch | None] = ContextVar("_BATCH", default=None)


@contextmanager
def sequences_known(batch: Batch) -> Iterator[None]:
    """Inside, transformers' models run over `batch` without a look at its positions and tokens.

    Args:
        batch: on the model's device, whose `position_ids` the model is given.
    """
    _register()
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def _register() -> None:
    masks: Any = sys.modules.get("transformers.masking_utils")
    models: Any = sys.modules.get("transformers.modeling_utils")
    if models is None:  # none of its models has been made
        return
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None or hasattr(find, "__wrapped__"):
        return

    @wraps(find)
    def known(position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        batch = _BATCH.get()
        # A model may count positions of its own, over all sequences.
        if batch is None or position_ids is not batch.position_ids:
            found: Tensor | None = find(position_ids, *args, **kwargs)
            return found
        several = batch.packed and len(batch.roles) > 1
        return batch.token_sequence()[None] if several else None

    masks.find_packed_sequence_indices = known
    kind = models.PreTrainedModel
    warn = getattr(kind, "warn_if_padding_and_no_attention_mask", None)
    if warn is None:
        return

    @wraps(warn)
    def without_padding(self: Any, *args: Any, **kwargs: Any) -> None:
        if _BATCH.get() is None:  # no batch holds padding
            warn(self, *args, **kwargs)

    kind.warn_if_padding_and_no_attention_mask = without_padding

"""Models that ranks share out, trained and put back: FSDP makes no copy that could be trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from geffect_fast.capture.compat import own_part, put_to_rest
from geffect_fast.capture.modes import modes_kept


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Inside, a model in parts may be trained; afterwards, after errors too, it is as it was.

    Kept meanwhile is a copy of this rank's part. Gradients that were there are out of the way.
    """
    put_to_rest(model)
    tensors = [own_part(t.detach()) for t in (*model.parameters(), *model.buffers())]
    before = [t.clone() for t in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]
    checkpointed: list[Any] = [
        m for m in model.modules() if vars(m).get("gradient_checkpointing") is True
    ]
    for p, _ in gradients:
        p.grad = None
    try:
        with modes_kept(model):
            yield
    finally:
        put_to_rest(model)
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)
        for p, gradient in gradients:
            p.grad = gradient
        for module in checkpointed:
            module.gradient_checkpointing = True

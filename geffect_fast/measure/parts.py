"""Models in parts outside of passes: trained and put back, and saved whole.

FSDP makes no copies of models that something could be done with instead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from geffect_fast.capture.compat import own_part, put_to_rest
from geffect_fast.capture.modes import modes_kept
from geffect_fast.capture.shards import whole_values
from geffect_fast.ranks import here


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


@contextmanager
def whole_on_first(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, some parameters of a model in parts are whole on the first rank, on the CPU.

    All ranks enter it together; inside it nothing is run. Those that are whole already stay.

    Args:
        model: that ranks share out.
        parameters: of it.
    """
    put_to_rest(model)
    shared_out = {str(id(p)): p for p in parameters if hasattr(p, "full_tensor")}
    ranks = here()
    with ranks.in_step(exchange=True):
        whole = whole_values(shared_out, ranks)
    held = [
        (module, key, p)
        for module in model.modules()
        for key, p in module._parameters.items()
        if str(id(p)) in whole
    ]
    instead = {name: nn.Parameter(of, shared_out[name].requires_grad) for name, of in whole.items()}
    # After a load of other weights FSDP's hooks look for its parts here.
    hooks = {module: module._load_state_dict_post_hooks for module, _, _ in held}
    try:
        for module, key, p in held:
            module._parameters[key] = instead[str(id(p))]
            module._load_state_dict_post_hooks = OrderedDict()
        yield
    finally:
        for module, key, p in held:
            module._parameters[key] = p
            module._load_state_dict_post_hooks = hooks[module]

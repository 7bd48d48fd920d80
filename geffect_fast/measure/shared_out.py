"""Work on models that ranks share out, outside of passes: copy whole, train and put back, save.

FSDP makes no copies of a model. A whole copy is built by hand; training works on the model itself.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from geffect_fast.capture.compat import fsdp_groups, own_kind, own_part, put_to_rest
from geffect_fast.capture.modes import modes_kept
from geffect_fast.capture.parts import whole_of, whole_values
from geffect_fast.ranks import here


def whole_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A whole copy, on the CPU, of a model that ranks share out; all ranks make it together.

    `fully_shard` gives modules a class that refuses to be copied. During the copy the modules have
    their original classes.

    Args:
        model: at rest.
        dtype: of the copy's floating-point tensors.
    """
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    memo: dict[int, Any] = {}
    for p in model.parameters():
        whole = whole_of(p.detach())
        memo[id(p)] = nn.Parameter(whole.to("cpu", dtype, copy=True), p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.to("cpu", dtype if b.is_floating_point() else b.dtype, copy=True)
    groups = fsdp_groups(model)
    kinds = [type(group) for group in groups]
    nobody = object()
    memo |= {id(group._get_fsdp_state()): nobody for group in groups}
    try:
        for group in groups:
            group.__class__ = own_kind(group)
        found = copy.deepcopy(model, memo)
    finally:
        for group, kind in zip(groups, kinds, strict=True):
            group.__class__ = kind
    for module in found.modules():
        for key in (REGISTRY_KEY, STATE_KEY):
            module.__dict__.pop(key, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [k for k, h in hooks.items() if getattr(h, "__self__", None) is nobody]:
                del hooks[number]
    return found


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Restore a model in parts afterwards, even after an error, so that it may be trained inside.

    A copy of this rank's part is kept meanwhile. Gradients that the parameters had are set aside,
    and are there again afterwards.
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
    """Have parameters of a model in parts whole inside, on the first rank and on the CPU.

    All ranks enter the block together, and the model is not run in it. Parameters that are whole
    already stay as they are.

    Args:
        model: that ranks share out.
        parameters: the model's parameters that are to be whole.
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
    # FSDP's hooks would look for its parts here after a load of other weights.
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

"""Parameters that ranks share out, whole on the first of them while it writes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from geffect_fast.capture.compat import put_to_rest
from geffect_fast.capture.shards import whole_values
from geffect_fast.ranks import here


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

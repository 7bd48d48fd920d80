"""Parameters that are used outside the forwards of the modules that own them, where no hook sees.

There are two ways to notice such a use. `OutsideUseInGraph` reads it from the leaves that the graph
of the losses reaches, which takes no time. `OutsideUse` looks at every operation, for where the
user's own backward wants weight gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from geffect_fast.capture.inputs import REPLAYING, tensors_of
from geffect_fast.capture.plan import Plan


class OutsideUseInGraph(AbstractContextManager["OutsideUseInGraph"]):
    """Context in which frozen parameters ask for a gradient, except where their modules run.

    So a graph that is made inside and reaches a parameter has used it outside its modules. Pass
    the names, `plan.names_of(leaves_of(y))`, to `plan.widen`.

    Args:
        plan: the plan of the model, whose parameters are frozen (`plan.frozen`).
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._owned = {
            where: [plan.parameters[name] for name in own.names.values()]
            for where, own in plan.owners.items()
        }

    def __enter__(self) -> OutsideUseInGraph:
        self._ask(True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._ask(False)

    def _ask(self, asks: bool) -> None:
        for own in self._owned.values():
            self._plan.ask(own, asks)

    def hide(self, where: str) -> list[nn.Parameter]:
        """Freeze a module's parameters as its forward begins; return those to show at its end."""
        # A module around this one may have frozen some of them already.
        hidden = [p for p in self._owned[where] if p.requires_grad]
        self._plan.ask(hidden, False)
        return hidden


_SEVERAL = (list, tuple)


class OutsideUse(TorchFunctionMode):
    """Mode that looks at every operation, for where parameters ask for gradients of their own.

    Args:
        plan: the plan of the model.
        running: tells whether the forward of the module with a given name is running.

    Attributes:
        found: names of the parameters that were used outside their modules; `Plan.widen` takes
            them.
    """

    def __init__(self, plan: Plan, running: Callable[[str], bool]) -> None:
        super().__init__()
        self.plan = plan
        self.running = running
        self.found: dict[str, None] = {}
        self.owners: dict[int, list[str]] = {}
        for where, own in plan.owners.items():
            module, names = own.module, own.names
            for local in names:
                self.owners.setdefault(id(module.get_parameter(local)), []).append(where)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Every operation of the model passes here, so each argument gets a short look only.
        for x in (*args, *kwargs.values()) if kwargs else args:
            if id(x) in self.owners:
                self._check(x, func, args, kwargs)
            elif isinstance(x, _SEVERAL):
                for y in x:
                    if id(y) in self.owners:
                        self._check(y, func, args, kwargs)
        return func(*args, **kwargs)

    def _check(self, p: nn.Parameter, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        owners = self.owners[id(p)]
        if REPLAYING.get() or not torch.is_grad_enabled():
            return
        if any(self.running(where) for where in owners):
            return
        # Reading a parameter's shape or dtype, or making zeros like it, is no use of it.
        leaf = p.detach().requires_grad_()
        replaced = tree_map(lambda x: leaf if x is p else x, (args, kwargs))
        used = func(*replaced[0], **replaced[1])
        if any(y.requires_grad and y is not leaf for y in tensors_of(used)):
            name = next(k for k, q in self.plan.parameters.items() if q is p)
            self.found[name] = None

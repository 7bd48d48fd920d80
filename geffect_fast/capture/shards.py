"""Models whose parameters FSDP2 (`torch.distributed.fsdp.fully_shard`) has shared out among ranks.

Each parameter is there twice: a part of it on every rank, which the model holds at rest, and the
whole, whose memory comes before a group's forward or backward and goes after it. Modules see the
whole one, so hooks, rules and graphs know parameters by it; sums of gradients stay in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import own_part
from geffect_fast.capture.leaves import leaves_of
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Share out a model's parameters among ranks, in place: every block a group, the rest another.

    Gradients are added up in fp32. Blocks are what the longest list of modules holds.

    Args:
        model: of transformers, the same on all ranks, on the CPU or its rank's device.
        ranks: of a process group.
        device: where the parts will be.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    how: dict[str, Any] = {"mesh": ranks.mesh(device)}
    if any(p.dtype != torch.float64 for p in model.parameters()):
        how["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in max(lists, key=len, default=()):
        fully_shard(block, **how)
    fully_shard(model, **how)


class Shards:
    """The groups of a model that is shared out.

    Args:
        model: of which FSDP2 has shared out every parameter.
        ranks: all of them.

    Attributes:
        ranks: as given.
        groups: modules whose parameters come and go together.

    Raises:
        InputError: this rank measures by itself.
        UnsupportedModelError: a parameter is whole, or laid out in a way that is not supported.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor, Shard

        if ranks.size == 1:
            raise InputError("model: FSDP shares it out; profile it on all of its ranks")
        self.ranks = ranks
        self.groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for group in self.groups:
            group.reshard()  # a root stays whole after a forward
        self._whole: dict[int, nn.Parameter] = {}
        self._own: dict[int, nn.Parameter] = {}
        self._group_of: dict[int, FSDPModule] = {}
        for name, p in model.named_parameters():
            if not isinstance(p, DTensor):
                raise UnsupportedModelError(
                    f"model: parameter '{name}' is whole, and others are shared out by FSDP; wrap "
                    "the root of the model by fully_shard too"
                )
            in_a_row = p.device_mesh.ndim == 1 and p.device_mesh.size() == ranks.size
            if not in_a_row or not all(each == Shard(0) for each in p.placements):
                raise UnsupportedModelError(
                    f"model: parameter '{name}' is laid out as {p.placements} over "
                    f"{p.device_mesh.size()} of {ranks.size} ranks; shard it by fully_shard over "
                    "one dimension of all ranks, without copies and tensor parallelism"
                )
        for group in self.groups:
            _check_sums(group)
            held = {
                (module, key): p
                for module in group.modules()
                for key, p in module._parameters.items()
                if p is not None
            }
            group.unshard()
            for (module, key), p in held.items():
                whole = module._parameters[key]
                if whole is not None and whole is not p:
                    self._whole[id(p)], self._own[id(whole)] = whole, p
                    self._group_of[id(whole)] = group
            group.reshard()

    def whole(self, own: nn.Parameter) -> nn.Parameter:
        """The whole parameter that a rank has a part of; at rest it has no memory."""
        return self._whole[id(own)]

    def own(self, whole: nn.Parameter) -> DTensor:
        """What the model holds at rest of a whole parameter."""
        return self._own[id(whole)]  # type: ignore[return-value]

    def groups_of(self, wholes: Sequence[nn.Parameter]) -> list[FSDPModule]:
        """The groups that hold parameters, in the model's order."""
        found = {id(self._group_of[id(p)]) for p in wholes}
        return [group for group in self.groups if id(group) in found]

    @contextmanager
    def unsharded(self, groups: Sequence[FSDPModule]) -> Iterator[None]:
        """Inside, the parameters of groups are whole. All ranks enter and leave it together."""
        for group in groups:
            group.unshard()
        try:
            yield
        finally:
            for group in groups:
                group.reshard()

    def sum_of_gradients(
        self, loss: Tensor, parameters: Sequence[nn.Parameter], *, more: bool
    ) -> list[Tensor | None]:
        """Of all ranks' losses the gradient, this rank's part of it by parameter; inside `sums`.

        Args:
            loss: this rank's.
            parameters: whole ones.
            more: whether another backward follows through the same graph.
        """
        reached = {id(leaf) for leaf in leaves_of(loss)}
        for group in self.groups_of([p for p in parameters if id(p) in reached]):
            # A group's gradients are added up together, so it must have the same ones on all ranks:
            # an expert that no token of a rank's was sent to has zeros there.
            missing = [
                p
                for p in parameters
                if id(p) not in reached and self._group_of[id(p)] is group and p.requires_grad
            ]
            if missing:
                loss = loss + _Nothing.apply(*missing).to(loss)
        loss.backward(retain_graph=more)
        found: list[Tensor | None] = []
        for whole in parameters:
            own = self._own[id(whole)]
            found.append(None if own.grad is None else own_part(own.grad))
            own.grad = None
        return found

    @contextmanager
    def sums(self) -> Iterator[None]:
        """Inside, a backward leaves sums over ranks on parameters, where there was nothing.

        What the program had set, and gradients that were there, are put back.
        """
        kept = [(own, own.grad) for own in self._own.values()]
        before = [
            (held, name, getattr(held, name))
            for group in self.groups
            for held in _parameter_groups(group)
            for name in _OF_SUMS
            if hasattr(held, name)
        ]
        for group in self.groups:
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            group.set_requires_gradient_sync(True, recurse=False)
        for own, _ in kept:
            own.grad = None
        try:
            yield
        finally:
            for own, grad in kept:
                own.grad = grad
            for held, name, value in before:
                setattr(held, name, value)

    def put_right(self) -> None:
        """After an error in the middle of a forward or backward: as before it."""
        for group in self.groups:
            group.reshard()
            reset = getattr(group, "reset_iter_state", None)  # of the root; not every torch has it
            if reset is not None and group is self.groups[0]:
                reset()


_OF_SUMS = (
    *("gradient_divide_factor", "force_sum_reduction_for_comms"),
    *("reduce_grads", "all_reduce_grads"),
)
"""Attributes of FSDP's groups that `Shards.sums` changes."""


def _check_sums(group: Any) -> None:
    """Raise `UnsupportedModelError` where gradients would be added up over ranks in 16 bits."""
    for held in _parameter_groups(group):
        weights = next(group.parameters()).dtype
        policy = held.mp_policy
        adds_up_in = policy.reduce_dtype or policy.param_dtype or weights
        if adds_up_in.itemsize < 4:
            raise UnsupportedModelError(
                f"model: FSDP adds up its gradients in {adds_up_in}; give fully_shard "
                "mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32)"
            )


def _parameter_groups(module: FSDPModule) -> list[Any]:
    # Nothing public tells what a program has set.
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)  # some versions have one
    return [held for held in (found or [state._fsdp_param_group]) if held is not None]


def gathered(parts: Tensor, of: DTensor) -> Tensor:
    """`(M, *shape)` from all ranks' parts of it.

    Args:
        parts: `(M, *own shape)`, of a parameter's layout behind the first axis.
        of: the parameter that a rank has its part of.
    """
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([len(parts), *of.shape])
    stride = torch.empty(shape, device="meta").stride()
    spread = DTensor.from_local(
        parts, of.device_mesh, [Shard(1)], run_check=False, shape=shape, stride=stride
    )
    return spread.full_tensor()


class _Nothing(torch.autograd.Function):
    """Zero, which depends on parameters by nothing: their gradients are zeros, not missing."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes
        )

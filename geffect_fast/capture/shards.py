"""Models whose parameters FSDP2 (`torch.distributed.fsdp.fully_shard`) has shared out among ranks.

Each parameter exists twice: as a part on every rank, which the model holds at rest, and as a whole,
whose memory is there only during a forward or backward of its group. Modules see the whole
parameter, so hooks, rules and graphs identify parameters by the whole one. Sums of gradients stay
in parts.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geffect_fast.capture.compat import check_replicas, fsdp_groups, own_part, put_to_rest
from geffect_fast.capture.leaves import leaves_of
from geffect_fast.capture.parts import holders, mesh_over
from geffect_fast.capture.structure import receive_weights
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule


def shard(
    model: nn.Module,
    ranks: Ranks,
    device: torch.device,
    what: str = "model",
    *,
    mesh: DeviceMesh | None = None,
    sent: bool = False,
) -> None:
    """Share out a model's parameters among ranks, in place, by groups: the blocks, and the rest.

    Gradients are added up in fp32, or in fp64 if all parameters are fp64. Blocks are the modules of
    the model's longest list of modules.

    Args:
        model: a model of transformers, the same on all ranks, on the CPU or its rank's device.
        ranks: the ranks of a process group.
        device: the device that will hold the parts.
        what: the name of the model in messages.
        mesh: the mesh of all ranks; a second dimension, as of `mesh_over`, holds the parts of one
            copy. None: a mesh of one dimension.
        sent: whether the first rank alone has the weights, on the CPU, and sends them group by
            group; the others have them on `meta`. Ranks are in step.

    Raises:
        InputError: ranks have different weights, whose parts would not make one model.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not sent:
        check_replicas(model, ranks, what)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    how: dict[str, Any] = {"mesh": mesh or mesh_over(ranks, device)}
    if any(p.dtype != torch.float64 for p in model.parameters()):
        how["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for group in (*max(lists, key=len, default=()), model):
        if sent:
            receive_weights(group, ranks, device)
        fully_shard(group, **how)


class Shards:
    """The groups of a model that is shared out, and its parameters as parts and wholes.

    Args:
        model: a model of which FSDP2 has shared out every parameter.
        ranks: all ranks.

    Attributes:
        ranks: as given.
        groups: modules whose parameters are gathered and freed together.
        places: by group, the places of its parameters: the module, the key, the whole parameter.
        holders: the ranks that together hold the copy of the model that this rank has a part of.
        copy: the numbers of the holders, in the order of their parts; those of all ranks where
            there is one copy.
        came: bytes that products have brought to this rank: `directions` to rows, or `rows` to
            parts of directions.

    Raises:
        InputError: this rank measures by itself.
        UnsupportedModelError: a parameter is whole, or laid out in a way that is not supported.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if ranks.size == 1:
            raise InputError("model: FSDP shares it out; profile it on all of its ranks")
        self.ranks, self._model = ranks, model
        self.groups: list[Any] = fsdp_groups(model)
        self.rest()
        self._some_frozen = any(not p.requires_grad for p in model.parameters())
        self._whole: dict[int, nn.Parameter] = {}
        self._own: dict[int, nn.Parameter] = {}
        self._group_of: dict[int, FSDPModule] = {}
        self.places: dict[FSDPModule, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        self.came: Counter[str] = Counter()
        meshes = set()
        for name, p in model.named_parameters():
            if not isinstance(p, DTensor):
                raise UnsupportedModelError(
                    f"model: parameter '{name}' is whole, and others are shared out by FSDP; wrap "
                    "the root of the model by fully_shard too"
                )
            meshes.add(p.device_mesh)
            in_parts = p.placements in ((Shard(0),), (Replicate(), Shard(0)))
            if not in_parts or p.device_mesh.size() != ranks.size or len(meshes) > 1:
                raise UnsupportedModelError(
                    f"model: parameter '{name}' is laid out as {p.placements} over "
                    f"{tuple(p.device_mesh.shape)} of {ranks.size} ranks; shard every parameter by "
                    "fully_shard over the same mesh of all ranks, (ranks,) or (copies, ranks of a "
                    "copy), without tensor parallelism"
                )
        self.holders = holders(next(model.parameters()))
        self.copy = dist.get_process_group_ranks(self.holders)
        for group in self.groups:
            _check_sums(group)
            held = {
                (module, key): p
                for module in group.modules()
                for key, p in module._parameters.items()
                if p is not None
            }
            group.unshard()
            places = self.places[group] = []
            for (module, key), p in held.items():
                whole = module._parameters[key]
                if whole is not None and whole is not p:
                    places.append((module, key, whole))
                    self._whole[id(p)], self._own[id(whole)] = whole, p
                    self._group_of[id(whole)] = group
            group.reshard()

    def whole(self, own: nn.Parameter) -> nn.Parameter:
        """The whole parameter of a part; at rest the whole has no memory."""
        return self._whole[id(own)]

    def own(self, whole: nn.Parameter) -> nn.Parameter:
        """The part of a whole parameter that the model holds at rest, a `DTensor`."""
        return self._own[id(whole)]

    @property
    def parts(self) -> list[nn.Parameter]:
        """The parts that the model holds at rest, also of parameters that are whole now.

        A root's parameters stay whole after a forward.
        """
        return list(self._own.values())

    def add_up(self, products: Sequence[Tensor]) -> None:
        """Replace products of this rank's parts by products of whole parameters, in place.

        Args:
            products: as `Ranks.add_up` takes them.
        """
        if 0 not in self.copy:  # another copy has the same parts
            for each in products:
                each.zero_()
        self.ranks.add_up(products)

    def said_of_products(self) -> str:
        """A sentence for results on how this rank formed products since `came` was cleared."""
        directions, rows = (self.came[kind] / 2**20 for kind in ("directions", "rows"))
        return (
            f"{directions:.3g} MiB of directions were brought to the rows, and {rows:.3g} MiB of "
            "rows to the directions' parts"
        )

    def groups_of(self, wholes: Sequence[nn.Parameter]) -> list[FSDPModule]:
        """The groups that hold some whole parameters, in the model's order."""
        found = {id(self._group_of[id(p)]) for p in wholes}
        return [group for group in self.groups if id(group) in found]

    @contextmanager
    def unsharded(self, groups: Sequence[FSDPModule]) -> Iterator[None]:
        """Inside, the parameters of groups are whole. All ranks enter and leave together."""
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
        """This rank's parts, by parameter, of the gradient of all ranks' losses; inside `sums`.

        Args:
            loss: this rank's loss.
            parameters: whole parameters.
            more: whether another backward follows through the same graph.
        """
        loss, _ = self.with_zeros(loss, parameters)
        if not loss.requires_grad:
            return [None] * len(parameters)
        loss.backward(retain_graph=more)
        found: list[Tensor | None] = []
        for whole in parameters:
            own = self._own[id(whole)]
            found.append(None if own.grad is None else own_part(own.grad))
            own.grad = None
        return found

    def with_zeros(
        self, loss: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, set[int]]:
        """Add zeros to a loss, so that it has gradients for all parameters of groups it reaches.

        A group's gradients are added up together, so all ranks must have gradients of the same
        parameters of a group: an expert that no token of a rank was sent to gets zeros on that
        rank. A group that only the losses of some ranks reach would be brought together by those
        ranks alone. That cannot happen where all parameters ask for gradients.

        Args:
            loss: this rank's loss.
            parameters: whole parameters.

        Returns:
            The loss, and the `id`s of the leaves that the loss itself depends on.

        Raises:
            UnsupportedModelError: the ranks' losses reach different groups.
        """
        reached = {id(leaf) for leaf in leaves_of(loss)} if loss.requires_grad else set()
        groups = self.groups_of([p for p in parameters if id(p) in reached])
        if self._some_frozen:
            self._check_alike([self.groups.index(group) for group in groups])
        for group in groups:
            missing = [
                p
                for p in parameters
                if id(p) not in reached and self._group_of[id(p)] is group and p.requires_grad
            ]
            if missing:
                loss = loss + _Nothing.apply(*missing).to(loss)
        return loss, reached

    def _check_alike(self, reached: list[int]) -> None:
        if any(others != reached for others in self.ranks.meet(reached)):
            raise UnsupportedModelError(
                "model: rows of some ranks reach what is trained in a block, and rows of others do "
                "not, as where experts alone are trained; FSDP cannot add up their gradients: give "
                "the model whole (--shard none), or train more of it"
            )

    @contextmanager
    def sums(self) -> Iterator[None]:
        """Inside, `.grad` of parts begins empty, and a backward leaves sums over ranks there.

        Afterwards the program's settings of FSDP and the earlier gradients are put back.
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

    def at_once(self, wholes: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters among `wholes` that a forward has whole at the same time, group by group.

        For each group these are the parameters of the group, of the next one, which is being
        gathered, and of the groups around both.
        """
        within = {id(group): {*map(id, group.modules())} for group in self.groups}
        running = ({id(group) for group in self.groups[i : i + 2]} for i in range(len(self.groups)))
        return [[p for p in wholes if some & within[id(self._group_of[id(p)])]] for some in running]

    def rest(self) -> None:
        """Free whole parameters."""
        put_to_rest(self._model)


@contextmanager
def at_work(model: nn.Module) -> Iterator[None]:
    """Have a sharded model at rest before and after the block that runs it, even after errors."""
    if not fsdp_groups(model):
        yield
        return
    try:
        with warnings.catch_warnings():
            # The warning is about outputs that are views; nothing here writes to them in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            put_to_rest(model)
            yield
    except BaseException:
        put_right(model)
        raise
    put_to_rest(model)


def put_right(model: nn.Module) -> None:
    """Bring a model back to rest after an error in the middle of a forward or backward."""
    put_to_rest(model)
    for root in fsdp_groups(model)[:1]:
        reset = getattr(root, "reset_iter_state", None)  # not every torch has it
        if reset is not None and root._get_fsdp_state()._is_root:  # otherwise the root never ran
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
    # No public interface tells what a program has set.
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)  # some versions have a single group instead
    return [held for held in (found or [state._fsdp_param_group]) if held is not None]


class _Nothing(torch.autograd.Function):
    """Zero whose graph reaches parameters, so that their gradients are zeros and not missing."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), dtype=parameters[0].dtype, device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes
        )

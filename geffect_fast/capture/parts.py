"""Tensors of which each rank holds a part: their holders, parts, wholes, and sums over parts.

All ranks call the functions that bring parts together.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.compat import put_to_rest
from geffect_fast.errors import InputError
from geffect_fast.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_of_hosts: weakref.WeakKeyDictionary[Ranks, list[weakref.ref[ProcessGroup]]] = (
    weakref.WeakKeyDictionary()
)
"""Groups of the meshes of several hosts. torch would make others for every mesh, and keep them."""


def mesh_over(ranks: Ranks, device: torch.device, *, by_host: bool = False) -> DeviceMesh:
    """The device mesh over the ranks, as FSDP takes it.

    Args:
        ranks: the ranks of a process group.
        device: this rank's device.
        by_host: whether the mesh is `(hosts, ranks of a host)`, where the ranks of a host have
            consecutive numbers, as torchrun gives them; else the mesh has one dimension.

    Raises:
        InputError: the number of ranks of a host is not known, or not the same on all hosts.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not by_host:
        return DeviceMesh(device.type, list(range(ranks.size)))
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    ranks.check_same({"shard hsdp, ranks of a host (LOCAL_WORLD_SIZE)": n})
    if not n or ranks.size % n:
        raise InputError(
            f"shard: hsdp needs equally many ranks on every host; there are {ranks.size} ranks, "
            f"and LOCAL_WORLD_SIZE is {n or 'not set'}; start them by torchrun, or give fsdp"
        )
    numbers, names = torch.arange(ranks.size).view(-1, n), ("copies", "parts")
    known = [group for of in _of_hosts.get(ranks, []) if (group := of()) is not None]
    if len(known) == len(names):
        return DeviceMesh.from_group(known, device.type, numbers, mesh_dim_names=names)
    mesh = DeviceMesh(device.type, numbers, mesh_dim_names=names)
    _of_hosts[ranks] = [weakref.ref(group) for group in mesh.get_all_groups()]
    return mesh


def mesh_of(model: nn.Module) -> DeviceMesh:
    """The mesh of the ranks that share out a model; the model is put to rest."""
    from torch.distributed.tensor import DTensor

    put_to_rest(model)
    return next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))


def holders(own: nn.Parameter) -> ProcessGroup:
    """The ranks that together hold one copy of a parameter, in the order of their parts.

    Args:
        own: this rank's part of the parameter, a `DTensor`. If its mesh has two dimensions, the
            first one counts copies.
    """
    from torch.distributed.tensor import DTensor

    assert isinstance(own, DTensor)
    return own.device_mesh.get_group(own.device_mesh.ndim - 1)


def parts_of(own: nn.Parameter) -> list[slice]:
    """The slice of a parameter's first axis that each of its holders has."""
    n_rows, n = own.shape[0], holders(own).size()
    each = -(-n_rows // n)  # as FSDP cuts
    return [slice(min(r * each, n_rows), min((r + 1) * each, n_rows)) for r in range(n)]


def whole_of(value: Any) -> Any:
    """The value as given; a tensor that ranks share out is brought together, so all call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_values(values: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Values by key, where tensors that ranks share out are brought together.

    Args:
        values: tensors and other values, under the same keys on all ranks.
        ranks: all ranks.

    Returns:
        On the first rank all values, with shared-out tensors on the CPU; on the others nothing.
    """
    whole: dict[str, Any] = {}
    for key, value in values.items():
        found = whole_of(value)
        if ranks.first:
            whole[key] = found if found is value else found.cpu()
    return whole


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut in the way that another tensor is shared out.

    Args:
        whole: a tensor that is the same on all ranks, or shared out already.
        like: a tensor of the same shape. If it is not shared out, `whole` stays whole.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(whole, DTensor) or not isinstance(like, DTensor):
        return whole
    where = like.to_local().device
    # Every rank has the tensor, so none sends it. A view would keep the whole in memory.
    return distribute_tensor(
        whole.to(where), like.device_mesh, like.placements, src_data_rank=None
    ).clone()


def sum_over_parts(own: Tensor, of: Tensor) -> Tensor:
    """The sum over ranks of the results for their parts of a tensor; `own` of a whole tensor.

    Args:
        own: this rank's result, of any shape, on the device of its part.
        of: the tensor. All ranks that share it out call this.
    """
    if not hasattr(of, "full_tensor"):
        return own
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert isinstance(of, DTensor)
    to_add = [Partial() if isinstance(each, Shard) else Replicate() for each in of.placements]
    return DTensor.from_local(own, of.device_mesh, to_add, run_check=False).full_tensor()

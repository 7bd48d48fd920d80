"""A simulated GPU: tensors that claim to be on the GPU, computed on the CPU, and refusing waits.

Operations for which a GPU makes the host wait raise `Waited` inside `SimulatedDevice`: reading a
number, a shape that depends on values (`nonzero`, a boolean index), a copy that is not queued
through pinned memory. Reading by an event (`geffect_fast.transfer.OnItsWay`) is allowed and
counted. Results are those of the CPU, so that the two can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from geffect_fast.capture import Plan
from geffect_fast.capture.attribution import ANY
from geffect_fast.capture.compat import plain_name
from geffect_fast.ops import backend

DEVICE = torch.device("cuda", 0)


class Waited(AssertionError):
    """The error of a host that waited for the device."""


class OnDevice(Tensor):
    """A tensor of the simulated device; `inner` holds its numbers.

    To torch's C++ the tensor is on the meta device, as autograd knows nothing of a GPU in a build
    without one. Python is told that the tensor is on a GPU.
    """

    device = DEVICE
    is_cuda = True
    is_cpu = False
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func} of a simulated device's tensor outside SimulatedDevice")


aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
}
"""Operations for which the host needs the result, or its size."""

INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class SimulatedDevice(TorchDispatchMode):
    """A mode in which `cuda:0` exists.

    Attributes:
        waits: number of waits for an event, the one allowed kind.
        calls: number of dispatched operations.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits = 0
        self.calls = 0
        self._refuses = True
        mode = self

        class Event:
            def record(self) -> None:
                pass

            def synchronize(self) -> None:
                mode.waits += mode._refuses

        tensor = torch.tensor

        def from_numbers(data: Any, **kwargs: Any) -> Tensor:
            where = torch.device(kwargs.pop("device", None) or "cpu")
            return tensor(data, **kwargs).to(where)  # this memory is not pinned

        monkeypatch.setattr(torch, "tensor", from_numbers)
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(backend, "_devices_told", {"cpu", "cuda"})

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Allow waits inside: for work that is done once a model, before any batch."""
        self._refuses = False
        try:
            yield
        finally:
            self._refuses = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self.calls += 1
        (own_args, own_values), from_device = _inside((args, tuple(kwargs.values())))
        own_kwargs = dict(zip(kwargs, own_values, strict=True))
        to_device = from_device
        if kwargs.get("device") is not None:
            to_device = torch.device(kwargs["device"]).type != "cpu"
        if func is aten._pin_memory.default:
            return _pinned(args[0].clone())
        if func is aten.is_pinned.default:
            return getattr(args[0], "pinned", False)
        self._check(func, args, kwargs, from_device, to_device)

        if kwargs.get("device") is not None:
            own_kwargs["device"] = torch.device("cpu")
        pin = own_kwargs.pop("pin_memory", None)
        found = func(*own_args, **own_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if not to_device:
            return _pinned(found) if pin else found
        if isinstance(found, (tuple, list)):
            found = type(found)(_there(x) for x in found)
        return return_and_correct_aliasing(func, args, kwargs, _there(found))

    def _check(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: bool, target: bool
    ) -> None:
        if not self._refuses or not (source or target):
            return
        if func in READS:
            raise Waited(f"{func} of a tensor on the device")
        if func in INDEXED and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise Waited(f"{func} by a mask on the device")
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            raise Waited(f"{func} without a size")
        if func is aten.segment_reduce.default and not kwargs.get("unsafe", False):
            raise Waited(f"{func} that checks its lengths")
        if func is aten.copy_.default:
            into, x = args[:2]
            queued = (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False)
            self._check_copy(x, into, queued)
        elif func is aten._to_copy.default and source != target:
            if source:
                raise Waited("a copy to the host")
            if not (kwargs.get("non_blocking") and getattr(args[0], "pinned", False)):
                raise Waited("a copy to the device from memory that is not pinned")

    @staticmethod
    def _check_copy(x: Tensor, into: Tensor, queued: bool) -> None:
        if isinstance(x, OnDevice) == isinstance(into, OnDevice):
            return
        host = into if isinstance(x, OnDevice) else x
        if host.dim() == 0 and not isinstance(x, OnDevice):
            return  # a number, which goes as an argument of the kernel
        if not (queued and getattr(host, "pinned", False)):
            raise Waited("a copy between host and device that is not queued")


def _inside(args: Any) -> tuple[Any, bool]:
    """Arguments with the inner tensors of the device's; whether any argument is one of these."""
    found: list[Any] = []
    any_there = False
    for x in args:
        if isinstance(x, OnDevice):
            found.append(x.inner)
            any_there = True
        elif isinstance(x, (tuple, list)):
            inner, there = _inside(x)
            found.append(inner)
            any_there |= there
        else:
            found.append(x)
    return type(args)(found), any_there


def _there(x: Any) -> Any:
    return OnDevice(x) if isinstance(x, Tensor) and not isinstance(x, OnDevice) else x


def _pinned(x: Tensor) -> Tensor:
    x.pinned = True  # type: ignore[attr-defined]
    return x


def plan_there(plan: Plan) -> Plan:
    """The plan of a copy of a model on the simulated device, taken from the plan on the CPU.

    Modules are tried once a model, before any batch, partly by forward mode, which torch does not
    offer to tensors of another class. These models' code shows that rows lie by sample.
    """
    there = moved(plan.model)
    parameters = {plain_name(name): p for name, p in there.named_parameters()}
    owners = {
        where: replace(own, module=there.get_submodule(where)) for where, own in plan.owners.items()
    }
    return Plan(there, {name: parameters[name] for name in plan.parameters}, owners, shown={ANY})


def moved(model: nn.Module) -> nn.Module:
    """A copy of a model on the simulated device."""
    model = copy.deepcopy(model)
    there: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                other = nn.Parameter(OnDevice(p.detach()), p.requires_grad)
                module._parameters[key] = there.setdefault(id(p), other)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = OnDevice(buffer)
    return model

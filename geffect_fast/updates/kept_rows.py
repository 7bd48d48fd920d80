"""Inputs and output gradients of an update's retain rows, kept until the update needs them no more.

Tensors for which the model's device has no room wait elsewhere, and are read back parameter by
parameter. They wait in memory of the host if the model is on a GPU, and in an unnamed temporary
file if the model is on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from geffect_fast.capture import Lookup, Outer, RowSum
from geffect_fast.errors import InputError
from geffect_fast.transfer import OnItsWay, on_device

KeptFactor = Outer | Lookup | RowSum
"""Factors that hold nothing but tensors, so that they can be kept."""


class KeptRows:
    """The factors of rows' gradients, by parameter and batch.

    Args:
        room: bytes of the model's device that the factors may take. A third is for factors that
            stay there, a third for those that are read back, the rest for computations with them.
        rule: the update rule, for messages.
    """

    def __init__(self, room: float, rule: str) -> None:
        self._room, self._rule = room / 3, rule
        self._held = 0
        self._counted: set[tuple[int, int]] = set()
        self._elsewhere: _Elsewhere | None = None
        self._last: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
        self._read: dict[str, dict[int, list[KeptFactor | Callable[[], KeptFactor]]]] = {}
        self._size: dict[tuple[str, int], int] = {}

    def keep(self, name: str, batch: int, factors: Sequence[KeptFactor]) -> None:
        """Keep a parameter's factors of one batch.

        Raises:
            InputError: the disk of temporary files is full.
        """
        read = self._read.setdefault(name, {}).setdefault(batch, [])
        away = 0
        for factor in factors:
            found = [x for x in vars(factor).values() if isinstance(x, Tensor)]
            # Layers with one input share its memory, which is counted once.
            new = {(x.data_ptr(), x.numel()): x.nbytes for x in found}
            size = sum(n for key, n in new.items() if key not in self._counted)
            if self._held + size <= self._room:
                self._held += size
                self._counted |= new.keys()
                read.append(factor)
            else:
                away += sum(x.nbytes for x in found)
                read.append(self._put_elsewhere(factor))
        self._size[name, batch] = away

    def _put_elsewhere(self, factor: KeptFactor) -> Callable[[], KeptFactor]:
        values = vars(factor)
        tensors = {key: x.detach() for key, x in values.items() if isinstance(x, Tensor)}
        if self._elsewhere is None:
            on_cpu = all(x.is_cpu for x in tensors.values())
            self._elsewhere = _InFile(self._rule) if on_cpu else _OnHost()
        # No tensor stays, however small: it would lie between those that go, whose memory could not
        # be used again. Layers that share an input come one after the other, so comparing with the
        # last tensor finds an input that was put away already.
        waiting = {}
        for key, x in tensors.items():
            before = self._last.get(key)
            if before is None or not _are_one(before[0], x):
                self._last[key] = before = x, self._elsewhere.put(x)
            waiting[key] = before[1]
        others: dict[str, Any] = {key: x for key, x in values.items() if key not in waiting}
        kind: Callable[..., KeptFactor] = type(factor)
        return lambda: kind(**others, **{key: read() for key, read in waiting.items()})

    def names(self) -> list[str]:
        """The names of the parameters."""
        return [*self._read]

    def batches(self, name: str) -> Iterator[tuple[int, list[KeptFactor]]]:
        """A parameter's factors batch by batch, read back one after the other."""
        for batch in self._read[name]:
            yield batch, self._factors(name, batch)

    def pairs(self, name: str) -> Iterator[tuple[int, list[KeptFactor], int, list[KeptFactor]]]:
        """A parameter's factors of every two batches, the earlier first.

        As many batches as there is room for are read back together, and the later ones one by one
        beside them.
        """
        batches = [*self._read[name]]
        while len(batches) > 1:
            group: dict[int, list[KeptFactor]] = {}
            size = 0
            for batch in batches:
                size += self._size[name, batch]
                if group and size > self._room:
                    break
                group[batch] = self._factors(name, batch)
            for later in batches[1:]:
                own = group[later] if later in group else self._factors(name, later)
                for earlier, factors in group.items():
                    if earlier < later:
                        yield earlier, factors, later, own
            batches = batches[len(group) :]

    def _factors(self, name: str, batch: int) -> list[KeptFactor]:
        found = self._read[name][batch]
        return [each if isinstance(each, KeptFactor) else each() for each in found]


class _OnHost:
    """Tensors of a GPU in pinned memory of the host; copies are queued like all work of the GPU."""

    def put(self, x: Tensor) -> Callable[[], Tensor]:
        copy, device = OnItsWay(x), x.device
        return lambda: on_device(copy.arrived()[0], device)


class _InFile:
    """Tensors of the CPU, one after the other in a file that is removed with its last reader."""

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._file: BinaryIO | None = None
        self._end = 0

    def put(self, x: Tensor) -> Callable[[], Tensor]:
        whole = x.contiguous()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this is
            self._file.seek(self._end)
            self._file.write(_bytes_of(whole))
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"update {self._rule}: the inputs and gradients kept of the retain rows do not fit "
                f"in temporary files: {error.strerror}; use fewer retain rows per update "
                "(--retain-batch-size), more room, or a larger disk in TMPDIR"
            ) from error
        read = partial(self._read, self._file, self._end, x.shape, x.dtype)
        self._end += whole.nbytes
        return read

    @staticmethod
    def _read(file: BinaryIO, begin: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        found = torch.empty(shape, dtype=dtype)
        file.seek(begin)
        file.readinto(_bytes_of(found))  # type: ignore[attr-defined]
        return found


_Elsewhere = _OnHost | _InFile


def _bytes_of(x: Tensor) -> Any:
    return x.view(-1).view(torch.uint8).numpy()


def _are_one(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors that both exist are the same memory, read the same way."""
    same = (x.data_ptr(), x.shape, x.dtype) == (y.data_ptr(), y.shape, y.dtype)
    return same and x.stride() == y.stride()

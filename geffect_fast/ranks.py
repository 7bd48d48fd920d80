"""The processes that measure one model together: ranks of a `torch.distributed` process group.

Every rank calls the same function with the same arguments. Rows are dealt out. Sums are added up
over the ranks, and results by row are gathered, so that each rank holds the whole result. Messages
about rows, errors and decisions go through a group of our own on the host, and so do sums of
tensors on the CPU. Sums of tensors on GPUs go through the program's group.

An error of one rank is told wherever ranks meet next, and ends the call on all ranks.
"""

from __future__ import annotations

import pickle
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from geffect_fast.errors import GEffectError, InputError, reason_of

if TYPE_CHECKING:
    from typing import ParamSpec

    P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")

PATIENCE = timedelta(minutes=5)
"""Longest wait of ranks for each other at the start of a call. Inside a call they wait as long as
the group does, because the work of a rank may take long."""

GRACE = 5.0
"""Seconds that a failed rank waits for the others to fail too, before it ends the group."""

BUCKET = 2**25
"""Bytes of small tensors that are added up in one message."""

_on_its_own: ContextVar[bool] = ContextVar("on_its_own", default=False)


class Ranks:
    """This process among those that measure together.

    Args:
        world: the program's process group; None: this process is the only one.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, world: dist.ProcessGroup | None = None) -> None:
        # torch ends the process with an abort if a group is still held when the process exits.
        self._groups = [weakref.ref(world)] if world is not None else []
        self.rank, self.size = (0, 1) if world is None else (world.rank(), world.size())
        self._within = self._said = self._broken = self._exchanges = False
        self._n_exchanges = 0
        if world is not None:
            _wait_in_store(self.rank, self.size)
            # A group of our own, so that no message of the program's comes between. A rank that is
            # killed is noticed at once, and a slow one is waited for.
            host = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            self._groups.append(weakref.ref(host))
            self._name = self.first_of(uuid4().hex)

    @property
    def _world(self) -> dist.ProcessGroup:
        return _still_there(self._groups[0])

    @property
    def _host(self) -> dist.ProcessGroup:
        return _still_there(self._groups[1])

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def backends(self) -> str:
        """The backend of the program's group by kind of device, such as `cpu:gloo,cuda:nccl`."""
        return str(dist.get_backend_config(self._world)) if self._groups else "none"

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Context of a call that all ranks make: all leave it well, or all leave it by an error.

        Inside another such call it does nothing.

        Args:
            what: the function's name, for messages.

        Raises:
            InputError: not all ranks came, or they call different functions.
            GEffectError: another rank failed; it is named, and its error's class is kept.
        """
        if self.size == 1 or self._within:
            yield
            return
        if self._broken:
            raise GEffectError(
                "process group: an error of one rank ended it in the middle of an exchange; begin "
                "another one"
            )
        self._within, self._said = True, False
        try:
            self._wait_for_all(what)
            try:
                yield
                self.meet()
            except Exception as error:
                told = isinstance(error, GEffectError) and error.told
                if not told and not self._said:
                    self._tell(error)
                raise
        finally:
            self._within = False

    @contextmanager
    def in_step(self, exchange: bool) -> Iterator[None]:
        """Context of work in which ranks wait for each other at every turn.

        In such work a rank cannot tell its error at a meeting, as the others do not meet. The work
        begins with a meeting. An error of one rank ends the process groups. The other ranks fail in
        turn, and find the line of the first error in their store. An error that all ranks raise
        alike, or that a meeting inside has told them, leaves the groups alive.

        Args:
            exchange: whether ranks wait for each other. If not, or inside other such work, the
                context does nothing.
        """
        if not exchange or self._exchanges:
            yield
            return
        self.meet()
        self._n_exchanges += 1
        self._exchanges, self._said = True, False
        try:
            yield
        except Exception as error:
            if not self._said:
                self._break_off(error)
            raise
        finally:
            self._exchanges = False

    def _break_off(self, error: Exception) -> None:
        """Tell the error, wait whether all ranks fail alike, and end the groups if they do not.

        Raises:
            GEffectError: another rank failed, and this one because of that.
        """
        self._said = True
        place = f"geffect_fast/{self._name}/{self._n_exchanges}"
        places = [f"{place}/{rank}" for rank in range(self.size)]
        store = dist.distributed_c10d._get_default_store()
        failed = [rank for rank, each in enumerate(places) if store.check([each])]
        own = _described(error)
        store.set(places[self.rank], pickle.dumps(own, 0).decode("latin1"))
        if isinstance(error, GEffectError):
            error.told = True
        if failed:
            self._broken = store.check([f"{place}/ended"])
            first = pickle.loads(store.get(places[failed[0]]).decode().encode("latin1"))
            if first == own:  # all ranks raise it alike
                return
            kind, said = first
            raise _everywhere(kind(f"rank {failed[0]}: {said}")) from error
        deadline = time.monotonic() + GRACE
        while not store.check(places) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not store.check(places):
            self._broken = True
            store.set(f"{place}/ended", "")
            for group in (self._world, self._host):
                group.abort()

    def meet(self, own: T | None = None) -> list[T]:
        """The values that all ranks bring, in the order of the ranks.

        Args:
            own: this rank's value; anything that pickles.

        Raises:
            GEffectError: a rank failed; as `together` raises it.
        """
        if self.size == 1:
            return [own]  # type: ignore[list-item]
        return self._brought(self._exchanged(None, own))

    def first_of(self, own: T) -> T:
        """The value that rank 0 brings."""
        return self.meet(own)[0]

    def united(self, own: Mapping[K, T]) -> dict[K, T]:
        """The values that all ranks bring by key, where each rank has keys of its own."""
        return {key: value for told in self.meet(own) for key, value in told.items()}

    def dealt(self, every: Sequence[T], *, in_step: bool = False) -> tuple[list[T], int]:
        """This rank's items of a sequence that all ranks know.

        Args:
            every: the sequence, the same on all ranks.
            in_step: whether all ranks get equally many items; the first item of all stands in where
                a rank is short.

        Returns:
            This rank's items, and the number of items at their end that stand in.
        """
        own = list(every[self.rank :: self.size])
        missing = -(-len(every) // self.size) - len(own) if in_step else 0
        return own + list(every[:1]) * missing, missing

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put in each tensor's place the sum of all ranks' tensors.

        Args:
            tensors: contiguous, on any devices, of the same shapes and dtypes on all ranks.

        Raises:
            GEffectError: a rank failed; as `together` raises it.
        """
        if self.size == 1:
            return
        small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.nbytes < BUCKET:
                small.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        # A rank that lacks memory fails here, where ranks meet, and not between sums.
        buckets = {kind: _bucket(alike) for kind, alike in small.items()}
        self.meet()
        for tensor in tensors:
            if tensor.nbytes >= BUCKET:
                self._add_up(tensor)
        for kind, alike in small.items():
            together: list[Tensor] = []
            for tensor in alike:
                if sum(t.numel() for t in together) + tensor.numel() > len(buckets[kind]):
                    self._add_up_together(together, buckets[kind])
                    together = []
                together.append(tensor)
            self._add_up_together(together, buckets[kind])

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Refuse values that differ between ranks.

        Args:
            values: values by name, which are meant to be equal on all ranks.

        Raises:
            InputError: a value differs; raised on all ranks, naming the first one and the rank.
        """
        told = self.meet(values)
        for name in told[0]:
            for rank, others in enumerate(told):
                if others[name] != told[0][name]:
                    self._said = True
                    raise _everywhere(
                        InputError(
                            f"{name}: rank {rank} has {others[name]}, and rank 0 "
                            f"{told[0][name]}; give all ranks the same"
                        )
                    )

    def broadcast(self, source: int, own: Any = None) -> Any:
        """The value that one rank, `source`, brings."""
        held = [own if source == self.rank else None]
        with _noticing():
            dist.broadcast_object_list(held, dist.get_global_rank(self._host, source), self._host)
        return held[0]

    def by_first(self, work: Callable[[], T]) -> T:
        """The result of work that rank 0 does while others wait; its error is raised on all ranks.

        Args:
            work: returns something that pickles.

        Raises:
            GEffectError: rank 0 failed; as `together` raises it.
        """
        found = None
        if self.first:
            try:
                found = work()
            except Exception as error:
                if self.size > 1:
                    self._tell(error)
                raise
        self.meet()
        return self.broadcast(0, found) if self.size > 1 else found  # type: ignore[return-value]

    def send(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by rank 0's, of the same shape and dtype, in place."""
        dist.broadcast(tensor, group=self._group_of(tensor), group_src=0)

    def check_serves(self, device: torch.device) -> None:
        """Raise `InputError` where the program's group cannot add up tensors of a device."""
        if self.size == 1 or device.type == "cpu":
            return
        if device.type not in [backend.split(":")[0] for backend in self.backends.split(",")]:
            raise InputError(
                f"process group: its backends are {self.backends}, and the model is on "
                f"{device.type}; begin it by init_process_group('cpu:gloo,cuda:nccl')"
            )

    def _wait_for_all(self, what: str) -> None:
        try:
            dist.monitored_barrier(self._host, PATIENCE, wait_all_ranks=True)
        except RuntimeError as error:
            raise _everywhere(_not_all_came(what, self.size)) from error
        called = self.meet(what)
        for rank, other in enumerate(called):
            if other != called[0]:
                raise _everywhere(
                    InputError(
                        f"{called[0]}: rank {rank} calls {other} at the same time; call the same "
                        "on every rank"
                    )
                )

    def _tell(self, error: Exception) -> None:
        """Tell the others, where they meet next, that this rank failed."""
        with suppress(GEffectError):  # if the others are gone, `error` is what is raised here
            self._exchanged(_described(error), None)
            self._said = True
            if isinstance(error, GEffectError):
                error.told = True

    def _exchanged(self, failed: Any, own: Any) -> list[Any]:
        told: list[Any] = [None] * self.size
        with _noticing():
            dist.all_gather_object(told, (failed, own), self._host)
        return told

    def _brought(self, told: list[Any]) -> list[Any]:
        for rank, (failed, _) in enumerate(told):
            if failed is not None:
                kind, said = failed
                self._said = True  # even if the error below is replaced on its way
                raise _everywhere(kind(f"rank {rank}: {said}"))
        return [own for _, own in told]

    def _add_up(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self._group_of(tensor))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup:
        return self._host if tensor.is_cpu else self._world

    def _add_up_together(self, alike: Sequence[Tensor], bucket: Tensor) -> None:
        ends = list(accumulate(tensor.numel() for tensor in alike))
        parts = [
            bucket[end - tensor.numel() : end].view(tensor.shape)
            for end, tensor in zip(ends, alike, strict=True)
        ]
        for part, tensor in zip(parts, alike, strict=True):
            part.copy_(tensor)
        self._add_up(bucket[: ends[-1]])
        for part, tensor in zip(parts, alike, strict=True):
            tensor.copy_(part)


def _bucket(alike: Sequence[Tensor]) -> Tensor:
    """A buffer for small tensors of one kind, which are added up in one message, or in several."""
    first, n = alike[0], sum(tensor.numel() for tensor in alike)
    return first.new_empty(min(n, BUCKET // first.element_size()))


def _still_there(group: weakref.ref[dist.ProcessGroup]) -> dist.ProcessGroup:
    found = group()
    if found is None:
        raise InputError(
            "process group: it has ended; begin another one, and make what used it anew"
        )
    return found


def _not_all_came(what: str, size: int) -> InputError:
    return InputError(
        f"{what}: not all {size} ranks of the process group called it within "
        f"{PATIENCE.seconds // 60} minutes; call it on every rank, or on one within "
        "geffect_fast.ranks.on_its_own()"
    )


def _wait_in_store(rank: int, size: int) -> None:
    """Wait until all ranks are here, before they make a group, whose own wait would be long.

    Raises:
        InputError: not all ranks come within `PATIENCE`.
    """
    global _n_waits
    _n_waits += 1
    store = dist.distributed_c10d._get_default_store()
    places = [f"geffect_fast/here/{_n_waits}/{each}" for each in range(size)]
    store.set(places[rank], "")
    try:
        store.wait(places, PATIENCE)
    except RuntimeError as error:
        raise _everywhere(_not_all_came("geffect_fast", size)) from error


_n_waits = 0


@contextmanager
def _noticing() -> Iterator[None]:
    """Raise an error of one line, that another rank is gone, where an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        raise _everywhere(
            GEffectError(
                "a rank of the process group has ended, so the others cannot go on; its last "
                "output says why"
            )
        ) from error


ALONE = Ranks()
"""A process that measures by itself."""

_known: list[Ranks] = []
"""The `Ranks` of the last process group that was seen, if any."""


def here() -> Ranks:
    """The ranks of the current process group; `ALONE` where there is none of several processes.

    All ranks of a process group make its first call.
    """
    if _on_its_own.get() or not dist.is_available() or not dist.is_initialized():
        return ALONE
    world = dist.group.WORLD
    if world is None or world.size() == 1:
        return ALONE
    if not _known or _known[0]._groups[0]() is not world:
        _known[:] = [Ranks(world)]
    return _known[0]


@contextmanager
def on_its_own() -> Iterator[None]:
    """Inside, this rank measures by itself, whatever the others do.

    Examples:
        >>> if torch.distributed.get_rank() == 0:
        ...     with gf.ranks.on_its_own():
        ...         result = gf.profile(model, tokenizer, **data, objectives=["ga"])
    """
    before = _on_its_own.set(True)
    try:
        yield
    finally:
        _on_its_own.reset(before)


def on_all_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """A function that the ranks of a process group begin and end together."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with here().together(function.__name__):
            return function(*args, **kwargs)

    return called


def _described(error: Exception) -> tuple[type[GEffectError], str]:
    """An error as other ranks raise it: its class, where it is one of ours, and its line."""
    if isinstance(error, GEffectError):
        return type(error), str(error)
    return GEffectError, reason_of(error)


def _everywhere(error: GEffectError) -> GEffectError:
    """The error, marked as one that all ranks raise."""
    error.told = True
    return error

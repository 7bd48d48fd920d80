"""Trying what may fail in any way, such as somebody's module that is called as nobody calls it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch

_SIGNS = ("can't allocate memory", "std::bad_alloc", "ALLOC_FAILED")
"""What torch's errors say where its CPU allocator, C++ or a CUDA library finds no memory."""


def no_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class Trying(AbstractContextManager["Trying"]):
    """Inside, any exception ends the block and is kept, but a lack of memory, which passes.

    Attributes:
        error: what was raised; None: nothing was.

    Examples:
        >>> with Trying() as trial:
        ...     y = module(x)
        >>> if trial.error is not None:
        ...     print(f"it does not run: {trial.reason}")
    """

    error: Exception | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or no_memory(error):
            return False
        self.error = error
        return True

    @property
    def reason(self) -> str:
        """The error's kind and the first line of what it says."""
        said = str(self.error).strip().splitlines()
        return f"{type(self.error).__name__}: {said[0].strip()[:160]}" if said else repr(self.error)

"""Trials of code that may fail in any way, such as a module that is called in an unusual way."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch

_SIGNS = ("can't allocate memory", "std::bad_alloc", "ALLOC_FAILED")
"""Text in torch's errors where its CPU allocator, C++ or a CUDA library finds no memory."""


def no_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class Trying(AbstractContextManager["Trying"]):
    """A context that ends at any exception and keeps it, except a lack of memory, which passes.

    Attributes:
        error: the exception that was raised; None: there was none.

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
        """The error's class and the first line of its message."""
        said = str(self.error).strip().splitlines()
        return f"{type(self.error).__name__}: {said[0].strip()[:160]}" if said else repr(self.error)

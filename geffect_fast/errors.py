"""The errors a user can meet; each carries one line that names the culprit and the remedy.

File names and other text from outside may hold any characters. Characters that are not plain parts
of a line are escaped.
"""

from __future__ import annotations

from geffect_fast.visible import one_line


class GEffectError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns.

    Args:
        problem: the message, or its part before the remedy.
        remedy: the end of the message, given apart where a caller may replace it.

    Attributes:
        problem: the message without a remedy that was given apart.
        told: whether another rank, which prints, raises the error too; see `geffect_fast.ranks`.
    """

    exit_code = 1
    told = False

    def __init__(self, problem: str = "", *, remedy: str = "") -> None:
        self.problem = one_line(problem)
        super().__init__(one_line(f"{problem}; {remedy}" if remedy else problem))


class InputError(GEffectError, ValueError):
    """An argument, file, row or field is unusable; the message names it and the remedy."""

    exit_code = 2


class UnsupportedModelError(GEffectError):
    """The model does something that cannot be attributed exactly; the message names the module."""

    exit_code = 2


class NonFiniteError(GEffectError, ArithmeticError):
    """A weight, loss or gradient is NaN or infinite; the message names the first place.

    Args:
        problem, remedy: as for every error.
        step: the step of a training at which this is so, with which the message then begins.
    """

    exit_code = 2

    def __init__(self, problem: str = "", *, remedy: str = "", step: int | None = None) -> None:
        super().__init__(problem if step is None else f"step {step}: {problem}", remedy=remedy)
        self.problem, self.step = one_line(problem), step


class OutOfMemoryError(GEffectError, MemoryError):
    """A batch does not fit; the message names the token budget and a smaller one."""

    exit_code = 2


class UnfinishedError(GEffectError):
    """A run of several steps stopped, and the steps it had written are kept.

    The message names what stopped it and says how to go on.
    """

    exit_code = 3


class InterruptedRunError(GEffectError):
    """Ctrl-C stopped a run of several steps; the message says what is kept and how to go on."""

    exit_code = 130


class GEffectWarning(UserWarning):
    """Something worth knowing that stops nothing; one line, as errors are."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(one_line(each) if isinstance(each, str) else each for each in said))


def reason_of(error: BaseException) -> str:
    """The message of any error, in one short line."""
    text, kind = in_one_line(getattr(error, "strerror", None) or error), type(error).__name__
    return text if isinstance(error, OSError | GEffectError) or text == kind else f"{kind}: {text}"


def in_one_line(error: object, longest: int = 160) -> str:
    """The message of another package's error, in one line and cut; its class if it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__

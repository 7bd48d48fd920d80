"""Changes of preprocessed CUDA C++ for a host compiler: kernels state their own launch bounds.

The macros of cuda_runtime.h leave SHIM_KERNEL, SHIM_LAUNCH_BOUNDS(...) and SHIM_SHARED in the text.
"""

from __future__ import annotations

import re

KERNEL, BOUNDS, SHARED = "SHIM_KERNEL", "SHIM_LAUNCH_BOUNDS", "SHIM_SHARED"


def rewritten(text: str) -> str:
    """Return the text with a first statement in every kernel that states its launch bounds.

    Raises:
        RuntimeError: shared memory is declared outside of kernels, so that it is unknown which
            kernels have to count it.
    """
    parts, at = [], 0
    for match in re.finditer(rf"\b{KERNEL}\b", text):
        parts.append(_without_kernels(text, at, match.start()))
        opens = _end_of_head(text, match.end())
        head, bounds = _split_bounds(text[match.end() : opens])
        if text[opens] == ";":
            parts.append(head)
            at = opens
            continue
        at = _closing(text, opens, "{}")
        body = text[opens + 1 : at].replace(SHARED, "")
        parts.append(f"{head}{{ ::cuda_shim::enter_kernel({bounds});{body}")
    return "".join([*parts, _without_kernels(text, at, len(text))])


def _without_kernels(text: str, start: int, end: int) -> str:
    if (found := text.find(SHARED, start, end)) >= 0:
        marker = re.findall(r'^# \d+ "([^"]+)"', text[:found], re.MULTILINE)
        where = f"{marker[-1]}: " if marker else ""
        raise RuntimeError(
            f"{where}shared memory of a function that is no kernel; declare it there"
        )
    return text[start:end]


def _end_of_head(text: str, at: int) -> int:
    """Return where a kernel's body begins, or its declaration ends."""
    while text[at] not in "{;":
        at = _closing(text, at, "()") + 1 if text[at] == "(" else at + 1
    return at


def _split_bounds(head: str) -> tuple[str, str]:
    """Return a kernel's head without its launch bounds, and the launch bounds."""
    at = head.find(BOUNDS)
    if at < 0:
        return head, ""
    opens = head.index("(", at)
    closes = _closing(head, opens, "()")
    return head[:at] + head[closes + 1 :], head[opens + 1 : closes]


def _closing(text: str, at: int, pair: str) -> int:
    """Return the position at which the bracket that opens at `at` is closed."""
    depth = 0
    for match in re.compile(f"[{re.escape(pair)}]").finditer(text, at):
        depth += 1 if match[0] == pair[0] else -1
        if depth == 0:
            return match.start()
    raise RuntimeError(f"nothing closes {pair[0]!r}: {text[at : at + 60]!r}")

"""Check that the sanitizers watch the kernels that serve; `make sanitize` begins with this check.

A kernel gets tensors that are longer than their memory, or misaligned, in a process of its own for
each, which must die with the right report.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MISLED = """
import ctypes, torch
from geffect_fast import ops
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
start = malloc(ctypes.c_size_t(64 * 4)) + {shift}
floats = torch.frombuffer((ctypes.c_float * {floats}).from_address(start), dtype=torch.float32)
x = floats.reshape(2, -1)
ops.segment_dot(x, x, torch.tensor([0, 2]))
"""
# Faults by the shift of a tensor in bytes and the number of floats that it claims to hold. With 96
# floats a vector of any width begins where the memory ends; one that began earlier would be
# reported as unknown.
FAULTS = {
    (0, 96): "AddressSanitizer: heap-buffer-overflow",
    (1, 62): "runtime error: load of misaligned address",
}
# No argument makes a kernel overflow, and some compiler flags leave this check out.
OVERFLOW = "__ubsan_handle_add_overflow_abort"


def unseen_fault() -> str | None:
    """Return a fault that the sanitizers miss, None where they find all."""
    for (shift, floats), report in FAULTS.items():
        done = subprocess.run(
            [sys.executable, "-c", MISLED.format(shift=shift, floats=floats)],
            cwd=Path(__file__).parent,  # where no package comes before the one on the path
            capture_output=True,
            text=True,
        )
        if done.returncode == 0 or report not in done.stderr:
            said = done.stderr.strip().splitlines() or ["nothing"]
            return f"a kernel was misled and '{report}' did not come, but: {said[-1]}"
    package = find_spec("geffect_fast")
    assert package is not None and package.origin is not None
    libraries = Path(package.origin).parent.glob("_kernels.*so")
    if not any(OVERFLOW.encode() in library.read_bytes() for library in libraries):
        return f"the kernels were built without {OVERFLOW}"
    return None


def main() -> int:
    """Return 0 if the sanitizers see every fault, or 1 after a line about the one they miss."""
    if (unseen := unseen_fault()) is not None:
        print(f"error: the sanitizers miss a fault: {unseen}", file=sys.stderr)
        return 1
    print("the sanitizers see a kernel that is misled")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A program for compute-sanitizer: every op, form and dtype once on small ragged samples.

python tests/gpu/sanitizer_case.py            # with the package on the path; DEVICE to try it out
"""

from __future__ import annotations

import os
from contextlib import suppress

import torch
from torch import Tensor

from geffect_fast import ops

DEVICE = os.environ.get("DEVICE", "cuda")
FORMS = {
    "GEFFECT_FAST_BILINEAR_FORM": ("fused", "cublas", "sm90", "gradient", ""),
    "GEFFECT_FAST_GHOST_FORM": ("gram", "gradient", "clusters", ""),
}


def run_all(dtype: torch.dtype, d_in: int, d_out: int) -> None:
    """Call every op on tensors of one dtype, with rows that begin on 16 bytes or not."""
    bounds = torch.tensor([0, 3, 3, 70, 75, 210], dtype=torch.int32, device=DEVICE)
    total = int(bounds[-1])

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    a, g, z = make(total, d_in), make(total, d_out), make(3, total, d_out)
    for form in FORMS["GEFFECT_FAST_BILINEAR_FORM"]:
        os.environ["GEFFECT_FAST_BILINEAR_FORM"] = form
        ops.segment_bilinear(a, g, make(3, d_out, d_in), bounds)
        ops.segment_bilinear(a, g, make(d_in, d_out).T, bounds, per_token=True)
    for form in FORMS["GEFFECT_FAST_GHOST_FORM"]:
        os.environ["GEFFECT_FAST_GHOST_FORM"] = form
        ops.ghost_norm(a, g, bounds)
    ops.ghost_dot(a, g, bounds, a[:75], g[:75], bounds[:5])
    ops.segment_dot(z, g, bounds)
    ops.segment_dot(g, make(d_out, total).T, bounds)
    for n_lists in (2, 8, 9, 17):
        ops.multi_tensor_gram([[make(d_in, d_out), make(5)[1:]] for _ in range(n_lists)])


def run_wrong_offsets() -> None:
    """Check that offsets which point anywhere are not followed."""
    a = torch.randn(50, 24, device=DEVICE).bfloat16()
    for wrong in ([0, 2**31 - 1, 50], [0, -7, 50], [0, 40, 20, 50]):
        bounds = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
        calls = (
            lambda b: ops.segment_bilinear(a, a, torch.stack([a[:24]] * 2), b),
            lambda b: ops.segment_dot(a, a, b),
            lambda b: ops.ghost_norm(a, a, b),
            lambda b: ops.ghost_dot(a, a, b, a, a, b),
        )
        for call in calls:
            with suppress(RuntimeError, ValueError):  # the last call leaves an error to report
                call(bounds)


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        run_all(dtype, 72, 136)
        run_all(dtype, 67, 131)
    run_wrong_offsets()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every op has run")

"""Whether rows belong to the samples they are counted for: tried once, by weighted losses.

Rows are counted for samples by where they stand, and a module may hand them on in another order, or
let samples meet. The batch itself can tell. With `l_i` the loss of sample `i` and `g_r` what a
module's output gradient is at row `r`, counted for sample `s`, a backward of `sum_i w_i l_i` leaves

    sum_i w_i dl_i/dy_r,    which is    w_s g_r    for weights that differ only where no other
                                                   sample's loss depends on the row.

Then every product and norm of samples is exact, whatever the rows of the inputs hold.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.capture.layer_rules import Call
from geffect_fast.capture.precision import COARSEST_FIRST, precisions
from geffect_fast.capture.segments import Rows, segment_sum
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.transfer import OnItsWay, on_device

OF_ROW = {"double": 1e-6, "single": 1e-3, "half": 0.05}
"""By how much of its own size a row's gradient may differ, by precision. Weights are powers of two,
so that nothing rounds in another way: this is for kernels that add up in any order."""

OF_CALL = {"double": 1e-12, "single": 1e-6, "half": 5e-3}
"""And by how much of the largest sample's in the call, where a row's is a small difference."""

OF_ALL = {"double": 1e-18, "single": 1e-9, "half": 1e-6}
"""And of the largest of all calls, where a whole call's is: keys that alone are attended to."""

EXPONENTS = {torch.float64: 40, torch.bfloat16: 40, torch.float32: 40, torch.float16: 3}
"""Weights go from 2 to the power of minus this to plus this: far from what a precision holds, also
where a model of fp64 computes its norms in fp32."""

FURTHEST = 20
"""The most that the exponents of two neighbours differ by: a mask of -30 is one for all purposes,
and lets 2 to the power of -43 through."""

ANY = "any"
"""Stands among structures found right where a model's own code shows that all are."""


class Attribution:
    """One trial: a backward whose gradients are noted, and one that they are compared with.

    Attributes:
        noting: whether the first backward is still to come, or running.
        alone: whether the second is run for this alone.

    Args:
        model: whose batch.
        n_samples: in it.
    """

    def __init__(self, model: nn.Module, n_samples: int) -> None:
        found = precisions(model)
        dtype = next((d for d in COARSEST_FIRST if d in found), torch.float32)
        self.precision = PRECISIONS[dtype]
        self.noting = True
        self.alone = False
        # No two are alike as long as there are as many, and those of few samples lie far apart:
        # what little one leaves in another's rows shows as well.
        span, generator = EXPONENTS[dtype], torch.Generator().manual_seed(n_samples)
        n_each, step = 2 * span + 1, min(2 * span // max(n_samples - 1, 1), FURTHEST) or 1
        chosen = torch.randperm(n_samples, generator=generator) * step
        sign = 1.0 - 2.0 * (chosen // n_each % 2).double()
        self._weights = sign * torch.exp2((chosen % n_each - span).double())
        self._noted: dict[tuple[int, int], Tensor] = {}
        self._directions: dict[tuple[int, torch.device], Tensor] = {}
        self._losses: Tensor | None = None
        self._compared: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def weighted(self, losses: Tensor) -> Tensor:
        """The sum to run the first backward from."""
        return (losses * on_device(self._weights, losses.device).to(losses.dtype)).sum()

    def compare_losses(self, recorded: Tensor, own: Tensor) -> None:
        """Compare losses of a forward in which positions were given to each sample by itself with
        those of the model as it is."""
        recorded = recorded.detach()
        allowed = OF_ROW[self.precision] * own.abs().amax()
        self._losses = ((recorded - own).abs() > allowed).any()

    def take(self, key: tuple[int, int], call: Call, g: Tensor) -> bool:
        """Take a gradient that has arrived at a module's output; whether it was for this alone.

        Of the first backward one number a row is noted, with which the second is compared.

        Args:
            key: of the call and output.
            call: the module's.
            g: `(..., d)`.
        """
        segments = call.checked_segments()
        if self.noting:
            self._noted[key] = self._along_noise(g)
        else:
            self._compare(key, call.where, g, call.rows(segments, g))
        return self.noting or self.alone

    def _compare(self, key: tuple[int, int], where: str, g: Tensor, rows: Rows) -> None:
        plain = self._along_noise(g)
        noted = self._noted.pop(key, None)
        if noted is None:  # no gradient arrived in the first
            noted = torch.zeros_like(plain)
        moved, still = (rows.flat(x[..., None])[:, 0] for x in (noted, plain))
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        size = torch.linalg.vector_norm(rows.flat(g), dim=1, dtype=wide).double()
        lengths = torch.tensor(rows.cu.lengths)
        weight = on_device(self._weights.repeat_interleave(lengths), g.device)
        of_call = segment_sum(size.square()[:, None], rows.cu).amax().sqrt()
        allowed = OF_ROW[self.precision] * size + OF_CALL[self.precision] * of_call
        self._compared.append((where, (moved / weight - still).abs(), allowed, of_call))

    def conclude(self) -> None:
        """Wait for the comparisons.

        Raises:
            UnsupportedModelError: a row of a module depends on other samples' losses, or the losses
                are not the model's own.
        """
        if not self._compared:
            return
        device = self._compared[0][-1].device
        largest = torch.stack([scale.to(device) for *_, scale in self._compared]).amax()
        floor = OF_ALL[self.precision] * largest
        # What is not finite is not wrong: it is the caller's to see.
        wrong = [
            (off > allowed + floor.to(off.device)).any().to(device)
            for _, off, allowed, _ in self._compared
        ]
        if self._losses is not None:
            wrong.append(self._losses.to(device))
        (found,) = OnItsWay(torch.stack(wrong)).arrived()
        rows = found.tolist()
        if self._losses is not None and rows.pop():
            raise UnsupportedModelError(
                "model: it uses positions of all samples together in another way than to add them "
                "to each; run it one sample at a time"
            )
        for (where, *_), is_wrong in zip(self._compared, rows, strict=True):
            if is_wrong:
                raise UnsupportedModelError(
                    f"module '{where}': losses of other samples depend on what is taken for a "
                    "sample's rows (rows in another order, or samples that meet in the model or "
                    "in loss_fn), so samples cannot be told apart; run it one sample at a time, or "
                    "freeze it"
                )

    def _along_noise(self, g: Tensor) -> Tensor:
        """`g` along a direction of noise, `(...)` fp64: 0 where `g` is, else by chance alone.

        In the precision of `g`: what is a power of two times another is so along the noise as well.
        """
        place = (g.shape[-1], g.device)
        if place not in self._directions:
            generator = torch.Generator().manual_seed(g.shape[-1])
            noise = torch.randn(g.shape[-1], generator=generator, dtype=torch.float64)
            self._directions[place] = on_device(noise, g.device)
        return (g @ self._directions[place].to(g.dtype)).double()


def code_of(function: Callable[..., Any]) -> Hashable:
    """What a function runs, and the plain values it is bound to: one that is made anew is the same.

    Of other callables the type's own.
    """
    if isinstance(function, partial):
        return code_of(function.func)
    inner: Any = getattr(function, "__func__", function)
    if not hasattr(inner, "__code__"):
        return id(type(function))
    cells = [cell.cell_contents for cell in inner.__closure__ or ()]
    return inner.__code__, tuple(x for x in cells if isinstance(x, _PLAIN))


_PLAIN = (bool, int, float, str, type(None))


PRECISIONS = {
    torch.float64: "double",
    torch.float32: "single",
    torch.bfloat16: "half",
    torch.float16: "half",
}

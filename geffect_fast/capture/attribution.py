"""Trial by weighted losses that rows belong to the samples they are counted for.

Rows are counted for samples by their place, but a module may reorder rows or let samples meet. The
batch itself shows whether a module does. Let `l_i` be the loss of sample `i`, and `g_r` the
gradient of a module's output `y` at row `r`, which is counted for sample `s`. A backward of
`sum_i w_i l_i` leaves at row `r`

    sum_i w_i dl_i/dy_r

For weights that differ, this sum equals `w_s g_r` only where no other sample's loss depends on the
row. Then every product and norm of samples is exact, whatever the rows of the inputs hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geffect_fast.capture.layer_rules import Call
from geffect_fast.capture.segments import Rows, segment_sum
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.precision import COARSEST_FIRST, precisions
from geffect_fast.transfer import OnItsWay, on_device

_ROW_TOLERANCE = {"double": 1e-6, "single": 1e-3, "half": 0.05}
"""Allowed difference of a row's gradient, relative to its own size, by precision. Weights are
powers of two, so they change no rounding: the allowance is for kernels that add in any order."""

_CALL_TOLERANCE = {"double": 1e-12, "single": 1e-6, "half": 5e-3}
"""The same relative to the largest sample's gradient in the call, for rows that are small
differences of large terms."""

_OVERALL_TOLERANCE = {"double": 1e-18, "single": 1e-9, "half": 1e-6}
"""The same relative to the largest gradient of all calls, for calls that are small differences as a
whole, such as the only keys that are attended to."""

_EXPONENTS = {torch.float64: 40, torch.bfloat16: 40, torch.float32: 40, torch.float16: 3}
"""Weights lie between 2 to the power of minus this and plus this, far inside the range of the
precision, even where a model of fp64 computes its norms in fp32."""

_LARGEST_STEP = 20
"""The largest difference between the exponents of two neighbours. An attention mask of -30 hides
tokens for all purposes, and lets a fraction of 2 to the power of -43 through."""

_PRECISIONS = {
    torch.float64: "double",
    torch.float32: "single",
    torch.bfloat16: "half",
    torch.float16: "half",
}

ANY = "any"
"""A mark among structures that were shown, where a model's own code shows that all are right."""


class Attribution:
    """One trial: the gradients of a first backward are noted, and a second is compared with them.

    Attributes:
        noting: whether the first backward is still to come, or running.
        alone: whether the second backward is run for the trial alone.

    Args:
        model: the model that is tried; its coarsest precision sets the tolerances.
        n_samples: number of samples in the batch.
    """

    def __init__(self, model: nn.Module, n_samples: int) -> None:
        found = precisions(model)
        dtype = next((d for d in COARSEST_FIRST if d in found), torch.float32)
        self.precision = _PRECISIONS[dtype]
        self.noting = True
        self.alone = False
        # All weights differ for as long as there are enough values. The weights of few samples lie
        # far apart, so that even a small share of one sample in another's rows shows.
        span, generator = _EXPONENTS[dtype], torch.Generator().manual_seed(n_samples)
        n_each, step = 2 * span + 1, min(2 * span // max(n_samples - 1, 1), _LARGEST_STEP) or 1
        chosen = torch.randperm(n_samples, generator=generator) * step
        sign = 1.0 - 2.0 * (chosen // n_each % 2).double()
        self._weights = sign * torch.exp2((chosen % n_each - span).double())
        self._noted: dict[tuple[int, int], Tensor] = {}
        self._directions: dict[tuple[int, torch.device], Tensor] = {}
        self._losses: Tensor | None = None
        self._compared: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def weighted(self, losses: Tensor) -> Tensor:
        """The weighted sum of the losses, from which the first backward runs."""
        return (losses * on_device(self._weights, losses.device).to(losses.dtype)).sum()

    def compare_losses(self, recorded: Tensor, own: Tensor) -> None:
        """Compare the recorded forward's losses with the model's own.

        Args:
            recorded: losses of a forward in which each sample was given positions of its own.
            own: losses of the model as it is.
        """
        recorded = recorded.detach()
        allowed = _ROW_TOLERANCE[self.precision] * own.abs().amax()
        self._losses = ((recorded - own).abs() > allowed).any()

    def take(self, key: tuple[int, int], call: Call, g: Tensor) -> bool:
        """Take the gradient of a module's output; return whether the trial alone needs it.

        The first backward leaves one number for each row, with which the second is compared.

        Args:
            key: the number of the call and the position of the output.
            call: the call of the module.
            g: the gradient, `(..., d)`.
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
        if noted is None:  # no gradient arrived in the first backward
            noted = torch.zeros_like(plain)
        moved, still = (rows.flat(x[..., None])[:, 0] for x in (noted, plain))
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        size = torch.linalg.vector_norm(rows.flat(g), dim=1, dtype=wide).double()
        lengths = torch.tensor(rows.cu.lengths)
        weight = on_device(self._weights.repeat_interleave(lengths), g.device)
        of_call = segment_sum(size.square()[:, None], rows.cu).amax().sqrt()
        allowed = _ROW_TOLERANCE[self.precision] * size + _CALL_TOLERANCE[self.precision] * of_call
        self._compared.append((where, (moved / weight - still).abs(), allowed, of_call))

    def conclude(self) -> None:
        """Wait for the comparisons and raise where one failed.

        Raises:
            UnsupportedModelError: other samples' losses depend on a row of a module, or the
                recorded losses are not the model's own.
        """
        if not self._compared:
            return
        device = self._compared[0][-1].device
        largest = torch.stack([scale.to(device) for *_, scale in self._compared]).amax()
        floor = _OVERALL_TOLERANCE[self.precision] * largest
        # A number that is not finite does not count as wrong: the caller sees it.
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
                "model: it does more with its shared position ids than add a position embedding to "
                "each sample, so samples cannot be told apart; run it one sample at a time"
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
        """Products of `g` with a direction of noise, `(...)` fp64.

        A product is 0 where `g` is 0, and otherwise only by chance. Products are taken in the
        precision of `g`, so that gradients that differ by a power of two have products that differ
        by the same power of two.
        """
        place = (g.shape[-1], g.device)
        if place not in self._directions:
            generator = torch.Generator().manual_seed(g.shape[-1])
            noise = torch.randn(g.shape[-1], generator=generator, dtype=torch.float64)
            self._directions[place] = on_device(noise, g.device)
        return (g @ self._directions[place].to(g.dtype)).double()

"""Whether rows belong to the samples they are counted for: tried once, by weighted losses.

Rows are counted for samples by where they stand, and a module may hand them on in another order, or
let samples meet. The batch itself can tell. With `l_i` the loss of sample `i` and `g_r` what a
module's output gradient is at row `r`, counted for sample `s`, a backward of `sum_i w_i l_i` leaves

    sum_i w_i dl_i/dy_r,    which is    w_s g_r    for random w only where no other sample's loss
                                                   depends on the row.

Then every product and norm of samples is exact, whatever the rows of the inputs hold.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from geffect_fast.capture.factors import widened
from geffect_fast.capture.segments import Rows, segment_sum
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.transfer import OnItsWay, on_device

OF_ROW = {"double": 1e-4, "single": 1e-2, "half": 0.3}
"""By how much of its own size a row's gradient may differ."""

OF_SAMPLE = {"double": 1e-6, "single": 3e-5, "half": 0.05}
"""And by how much of that of its sample: rounding, where a row's gradient is a small difference."""

OF_ALL = {"double": 1e-10, "single": 1e-6, "half": 2e-3}
"""And of the largest of all samples and modules, where a whole sample's is: that of a key which
alone is attended to."""

_SHOWN: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()
"""What was found right, by model."""


class Attribution:
    """One trial: a backward whose gradients are noted, and one that they are compared with.

    Args:
        model: whose batch.
        n_samples: in it.
    """

    def __init__(self, model: nn.Module, n_samples: int) -> None:
        self.precision = _precision(model)
        self.noting = True
        generator = torch.Generator().manual_seed(n_samples)
        size = 0.5 + torch.rand(n_samples, generator=generator, dtype=torch.float64)
        sign = torch.randint(2, (n_samples,), generator=generator) * 2 - 1
        self._weights = size * sign
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

    def note(self, key: tuple[int, int], g: Tensor) -> None:
        """Take note of a gradient `(..., d)` of the first backward: of every row one number."""
        self._noted[key] = self._along_noise(g)

    def compare(self, key: tuple[int, int], where: str, g: Tensor, rows: Rows) -> None:
        """Compare what was noted with the gradient of the second backward.

        Args:
            key: of the call and output.
            where: the module's name.
            g: `(..., d)`.
            rows: how its rows lie.
        """
        plain = self._along_noise(g)
        noted = self._noted.pop(key, None)
        if noted is None:  # no gradient arrived in the first
            noted = torch.zeros_like(plain)
        moved, still = (rows.flat(x[..., None])[:, 0] for x in (noted, plain))
        squares = widened(rows.flat(g)).square().sum(1).double()
        of_sample = segment_sum(squares, rows.cu)
        sample = torch.arange(len(rows.cu)).repeat_interleave(torch.tensor(rows.cu.lengths))
        sample = on_device(sample, g.device)
        weights = on_device(self._weights, g.device)
        allowed = OF_ROW[self.precision] * squares.sqrt()
        allowed += OF_SAMPLE[self.precision] * of_sample.sqrt()[sample]
        off = (moved - weights[sample] * still).abs()
        self._compared.append((where, off, allowed, of_sample.amax().sqrt()))

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
        """`g` along a direction of noise, `(...)` fp64: 0 where `g` is, else by chance alone."""
        place = (g.shape[-1], g.device)
        if place not in self._directions:
            generator = torch.Generator().manual_seed(g.shape[-1])
            noise = torch.randn(g.shape[-1], generator=generator, dtype=torch.float64)
            self._directions[place] = on_device(noise, g.device)
        return g.double() @ self._directions[place]


def is_shown(model: nn.Module, loss_fn: Any, structure: Hashable) -> bool:
    """Whether rows were found right for a model, a loss function and a structure of calls."""
    return (_code(loss_fn), structure) in _SHOWN.get(model, ())


def keep_shown(model: nn.Module, loss_fn: Any, structure: Hashable) -> None:
    """Keep that they were."""
    _SHOWN.setdefault(model, set()).add((_code(loss_fn), structure))


def _code(function: Callable[..., Any]) -> Hashable:
    """What a function runs, and the plain values it is bound to: one that is made anew is the same.

    Of other callables the type's own.
    """
    if isinstance(function, partial):
        return _code(function.func)
    inner: Any = getattr(function, "__func__", function)
    if not hasattr(inner, "__code__"):
        return id(type(function))
    cells = [cell.cell_contents for cell in inner.__closure__ or ()]
    return inner.__code__, tuple(x for x in cells if isinstance(x, _PLAIN))


_PLAIN = (bool, int, float, str, type(None))


def _precision(model: nn.Module) -> str:
    """The lowest precision in which something may be computed."""
    parameters = list(model.parameters())
    kinds = {p.device.type for p in parameters}
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters) or any(
        torch.is_autocast_enabled(kind) for kind in kinds & {"cpu", "cuda"}
    ):
        return "half"
    if torch.get_float32_matmul_precision() != "highest" and "cuda" in kinds:
        return "half"
    return "double" if all(p.dtype == torch.float64 for p in parameters) else "single"

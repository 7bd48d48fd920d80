"""SAM: forgetting that holds around the weights, and other smoothings of the forget part."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np
import torch

from geffect_fast.capture.parts import part_of
from geffect_fast.errors import InputError
from geffect_fast.objectives.parameters import parameter
from geffect_fast.updates.base import Need, UpdateRule
from geffect_fast.updates.gradients import Gradients, Move, add, gram
from geffect_fast.updates.registry import register
from geffect_fast.updates.step import Step


@register("sam")
@dataclass(frozen=True)
class SAM(UpdateRule):
    """The forget gradient where the forget part is worst nearby, and the retain gradient as it is.

        e = rho f / |f|        f1 = f(theta + e)        g = f1 + w r

    Other smoothings of the forget part `F`, in place of SAM or beside it, share its passes:

        sigma      random smoothing, E F(theta + d) with d ~ N(0, sigma^2): the mean of `draws`
                   gradients at theta + e + d
        penalty    + penalty |f|, whose gradient is penalty H f / |f|: penalty (f1 - f) / rho
        curvature  + curvature |f1 - f|^2, whose gradient is 2 curvature (H(theta + e) - H(theta)) d
                   with d = f1 - f; products with the Hessian matrix are differences of gradients
                   at points rho along d, too

    Args:
        rho: radius of the ascent, and distance of points whose gradients are subtracted.
        ascent: whether the gradient is taken at theta + e, as SAM does; else at theta.
        sigma: standard deviation of random smoothing.
        draws: number of draws of random smoothing.
        penalty, curvature: weights of these two terms.
        seed: seed of the draws.

    Source: arXiv 2502.05374, in whose released code the options have no effect; the curvature is
        that of arXiv 1811.09716.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"full_precision"})
    rho: float = parameter(0.01, at_least=0)
    ascent: bool = parameter(True)
    sigma: float = parameter(0.0, at_least=0)
    draws: int = parameter(1, at_least=1)
    penalty: float = parameter(0.0, at_least=0)
    curvature: float = parameter(0.0, at_least=0)
    seed: int = parameter(0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho and (self.penalty or self.curvature):
            what = "penalty" if self.penalty else "curvature"
            raise InputError(
                f"update sam: {what} takes differences of gradients rho apart, and rho is 0; give "
                "rho, such as 0.01"
            )

    def apply(self, step: Step) -> None:
        f = step.forget()
        r = step.retain() if step.retain_weight else None
        e = _along(f, self.rho)
        differs = bool(self.penalty or self.curvature)
        f1: Gradients | None = None
        if differs or (self.ascent and self.rho and not self.sigma):
            f1 = step.forget_at(e)
        added: list[Move] = []
        if differs and f1 is not None:
            d = {name: f1[name] - g for name, g in f.items()}
            of_d = self.penalty / self.rho
            if self.curvature:
                factor = 2 * self.curvature * sqrt(float(gram([d])[0, 0])) / self.rho
                along = _along(d, self.rho)
                added = [(factor, step.forget_at(along, e)), (-factor, step.forget_at(along))]
                of_d -= factor
            added.append((of_d, d))
        out = self._smoothed(step, f, f1, e)
        for factor, of in added:
            add(out, of, factor)
        step.write(out, r)

    def _smoothed(self, step: Step, f: Gradients, f1: Gradients | None, e: Move) -> Gradients:
        """The gradient at theta or theta + e, or its mean over draws around that point."""
        if not self.sigma:
            return f1 if self.ascent and f1 is not None else f
        mean: Gradients = {}
        for draw in range(self.draws):
            state = np.random.SeedSequence([self.seed, step.number, draw]).generate_state(1)
            generator = torch.Generator().manual_seed(int(state[0]))
            noise = {
                name: part_of(torch.randn(g.shape, generator=generator).to(g.device, g.dtype), g)
                for name, g in f.items()
            }
            moves = [(self.sigma, noise)]
            if self.ascent:
                moves.append(e)
            add(mean, step.forget_at(*moves), 1 / self.draws)
        return mean


def _along(g: Gradients, size: float) -> Move:
    """A move along `g` of length `size`; none where `g` is zero."""
    norm = sqrt(float(gram([g])[0, 0]))
    return (size / norm if norm else 0.0), g

"""Rules against conflicts between the gradients of the forget part and of the retain rows.

`f` is the gradient of the objective's forget part, `r` that of the retain loss, and `w` the weight
of the retain loss in the objective. `w` is 1 for an objective with a retain part, which holds its
own coefficients. It is 0 for an objective without one: `r` is protected then, and not descended on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geffect_fast.objectives.parameters import parameter
from geffect_fast.updates.base import Need, UpdateRule
from geffect_fast.updates.gradients import Gradients, add, gram, grams, of
from geffect_fast.updates.registry import register
from geffect_fast.updates.step import Step


@register("sgd")
@dataclass(frozen=True)
class SGD(UpdateRule):
    """The objective's gradient as it is, `g = f + w r`."""

    def apply(self, step: Step) -> None:
        step.write(step.forget(), step.retain() if step.retain_weight else None)


@register("orthograd")
@dataclass(frozen=True)
class OrthoGrad(UpdateRule):
    """The forget gradient without its projection onto the span of the retain rows' gradients.

        g = g_u - sum_i c_i g_i + w g_r        gram c = <g_i, g_u>

    `gram`, the products and the sum of the rows' gradients, weighted by `w - c_i`, are computed
    from the rows' inputs and output gradients: no gradient of a row is stored.

    Args:
        rank_tol: eigenvalues of the rows' cosines count as zero if they are at most this fraction
            of the largest one.
        room: memory of the model's device for the rows' inputs and output gradients, in sizes of
            the trainable parameters. The rest waits in memory of the host, or in a file if the
            model is on the CPU.

    Source: arXiv 2503.02312, with a solve in place of a QR decomposition of stored gradients.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"retain_rows"})
    rank_tol: float = parameter(1e-6, above=0, below=1)
    room: float = parameter(1.0, at_least=0)

    def apply(self, step: Step) -> None:
        found = step.row_products(step.forget_in_place(), self.room)
        step.add_rows(step.retain_weight - found.coefficients(self.rank_tol), found.kept)


@register("gru")
@dataclass(frozen=True)
class GRU(UpdateRule):
    """The forget gradient without its part against a smoothed retain gradient.

        m <- gamma r + (1 - gamma) m
        g = f - min(<f, m>, 0) / |m|^2 m + w r

    Args:
        gamma: weight of this update's retain gradient in the smoothed one.

    Source: arXiv 2503.09117; `gamma` is 0.8 in its released code.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"retain"})
    gamma: float = parameter(0.8, above=0, at_most=1)

    def apply(self, step: Step) -> None:
        f, r = step.forget(), step.retain()
        smoothed = {name: self.gamma * g for name, g in r.items()}
        add(smoothed, step.memory.get("smoothed", {}), 1 - self.gamma)
        (_, along), (_, size) = gram([f, smoothed]).tolist()
        if along < 0:
            add(f, smoothed, -along / size)
        step.remembered["smoothed"] = smoothed
        step.write(f, r)


@register("gu")
@dataclass(frozen=True)
class GU(UpdateRule):
    """The forget gradient without its part along the retain gradient, in the optimizer's metric.

        g = f - <f, r>_H / <r, r>_H r + w r        <x, y>_H = sum x y / (sqrt(v_hat) + eps)

    `H` is the factor by which Adam scales a gradient, from Adam's state before the update. So the
    step along `g - w r` does not change the retain loss, to first order. The plain inner product is
    taken for SGD, and for Adam's first step, before which Adam has no state.

    Source: arXiv 2511.17100.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"retain", "optimizer"})

    def apply(self, step: Step) -> None:
        f, r = step.forget(), step.retain()
        metrics = {name: step.metric(name) for name in r}
        known = all(h is not None for h in metrics.values())
        sums = torch.zeros(2, dtype=torch.float64)
        for name, h in metrics.items():
            own = r[name]
            scaled = own * h.to(own) if known and h is not None else own
            sums += gram([{name: of(f, name, [r])}, {name: own}, {name: scaled}])[2, :2]
        along, size = sums.tolist()
        if size > 0:
            add(f, r, -along / size)
        step.write(f, r)


@register("blur")
@dataclass(frozen=True)
class BLUR(UpdateRule):
    """The forget gradient, and the part of the retain gradient that is orthogonal to it.

        g = f + w (r - <f, r> / |f|^2 f)

    Source: arXiv 2506.08164; its gamma is the coefficient of the forget part in the objective.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"retain", "retain_part"})

    def apply(self, step: Step) -> None:
        f, r = step.forget(), step.retain()
        (size, along), _ = gram([f, r]).tolist()
        if size > 0:
            factor = 1.0 - step.retain_weight * along / size
            f = {name: g.mul_(factor) for name, g in f.items()}
        step.write(f, r)


@register("pcgrad")
@dataclass(frozen=True)
class PCGrad(UpdateRule):
    """Each gradient without its part against the other.

        f' = f - min(<f, r>, 0) / |r|^2 r        r' = r - min(<f, r>, 0) / |f|^2 f
        g = f' + w r        or with `both` f' + w r'

    Args:
        by_tensor: whether inner products are taken tensor by tensor, not of whole gradients.
        both: whether the retain gradient gives way too.

    Source: arXiv 2001.06782, which has `both`; for unlearning arXiv 2604.14808, which lacks `both`
        and projects module by module.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"retain"})
    by_tensor: bool = parameter(True)
    both: bool = parameter(False)

    def apply(self, step: Step) -> None:
        f, r = step.forget(), step.retain()
        names, found = grams([f, r])
        if not self.by_tensor:
            found = found.sum(0).expand_as(found)
        against = found[:, 0, 1].clamp(max=0)
        of_r, of_f = (
            torch.where(size > 0, -against / size, 0.0) for size in (found[:, 1, 1], found[:, 0, 0])
        )
        out: Gradients = {}
        w = step.retain_weight
        for p, name in enumerate(names):
            # The factors of f and r in the sum of the two.
            factor_f = 1.0 + w * float(of_f[p]) * self.both
            factor_r = float(of_r[p]) + w
            if name in f or factor_r:
                x, y = of(f, name, [r]), of(r, name, [f])
                out[name] = x * factor_f + y * factor_r
        step.write(out)


@register("sago")
@dataclass(frozen=True)
class SAGO(UpdateRule):
    """The forget gradient in entries where both signs agree, the retain gradient in the others.

        g = f [f r >= 0] + w r [f r < 0]

    Source: arXiv 2604.14808; its alpha and gamma are the objective's coefficients.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"retain", "retain_part"})

    def apply(self, step: Step) -> None:
        f, r = step.forget(), step.retain()

        def chosen(x: Tensor, y: Tensor) -> Tensor:
            return torch.where(x * y >= 0, x, step.retain_weight * y)

        step.write({name: chosen(g, r[name]) if name in r else g for name, g in f.items()})

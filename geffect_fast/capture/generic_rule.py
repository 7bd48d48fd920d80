"""The rule for any module: the module is run again, and one vjp is taken for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from geffect_fast.capture.compat import eagerly, forward_differentiable
from geffect_fast.capture.factors import (
    Explicit,
    Factor,
    Tangent,
)
from geffect_fast.capture.inputs import REPLAYING, tensors_of
from geffect_fast.capture.layer_rules import Call, NormWeights
from geffect_fast.capture.segments import Segments
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.trying import Trying


class GenericCall(Call):
    """A call of any module: the module is run again, and its vjp is taken one sample at a time.

    The gradient of sample `i` is the vjp of the output gradient with all other samples' rows
    zeroed. This is exact whatever the module does inside, as long as the rows of its outputs belong
    to samples.

    Attributes:
        returned: the tensors that the module returned in the call.
    """

    returned: list[Tensor] = field(default_factory=list)

    def keep(self, output: Any, norm_weights: NormWeights) -> None:
        self.returned = [y.detach() for y in tensors_of(output)]

    def checked_segments(self) -> Segments:
        segments = super().checked_segments()
        if segments.n_samples > 1 and not self.inputs.tensors:
            raise UnsupportedModelError(
                f"module '{self.where}' is called without a tensor, so its share cannot be told "
                "apart by sample; run it one sample at a time"
            )
        return segments

    def gradients(self, grads: list[Tensor | None]) -> Iterator[tuple[str, Factor]]:
        """Each parameter's name in the model with its factor.

        Args:
            grads: the gradient of every tensor that the module returned; None: it was not used.
        """
        segments = self.checked_segments()
        leaves = {k: self.module.get_parameter(k).detach().requires_grad_() for k in self.names}
        again: list[Tensor] = []
        with Trying() as replay:
            again = self._outputs(leaves)
        if replay.error is not None:
            raise UnsupportedModelError(
                f"module '{self.where}' cannot be run again on the same input ({replay.reason}), "
                "so its share cannot be told apart by sample; freeze it"
            ) from replay.error
        if not all(map(_alike, again, self.returned)):
            raise UnsupportedModelError(
                f"module '{self.where}' does not return the same when it is run again on the same "
                "input (it is random, or depends on what surrounds it), so its share cannot be "
                "told apart by sample; freeze it"
            )
        # Outputs behind the last one that received a gradient are not in `grads`.
        used = {
            position: (y, g)
            for position, (y, g) in enumerate(zip(again, grads, strict=False))
            if g is not None and y.requires_grad
        }
        rows = {
            position: self.rows(segments, g if segments.n_samples > 1 else g[..., None])
            for position, (_, g) in used.items()
        }
        formed: dict[int | None, tuple[Tensor | None, ...]] = {}

        def vjp(i: int | None) -> tuple[Tensor | None, ...]:
            """The gradients of sample `i`; for None those of all samples together."""
            if i not in formed:
                # Only the last result is kept, which serves all parameters where one after the
                # other asks for the same: for a single sample, and for all samples together.
                formed.clear()
                masked = [
                    g if i is None else rows[position].only(g, i)
                    for position, (_, g) in used.items()
                ]
                formed[i] = (
                    torch.autograd.grad(
                        [y for y, _ in used.values()],
                        list(leaves.values()),
                        masked,
                        retain_graph=True,
                        allow_unused=True,
                    )
                    if used
                    else (None,) * len(leaves)
                )
            return formed[i]

        def jvp(local: str, direction: Tensor) -> list[Tangent] | None:
            moved = self._tangents(leaves, local, direction)
            if moved is None:
                return None
            return [
                Tangent(at.flat(moved[position]), at.flat(used[position][1]), at.cu)
                for position, at in rows.items()
            ]

        for k, (local, leaf) in enumerate(leaves.items()):
            one = _nth(vjp, k, leaf)
            yield (
                self.names[local],
                Explicit(one, partial(one, None), partial(jvp, local), segments.n_samples),
            )

    def _tangents(
        self, leaves: dict[str, Tensor], local: str, direction: Tensor
    ) -> list[Tensor] | None:
        """The outputs' derivatives along `direction` of one parameter; None where they have none.

        An operation with a backward of its own and no forward-mode rule may silently drop the
        tangent, so the caller compares the result with a vjp.
        """
        moved: list[Any] = []
        with (
            Trying() as trial,
            forward_ad.dual_level(),
            torch.no_grad(),
            forward_differentiable(self.module),
        ):
            dual = {k: leaf.detach() for k, leaf in leaves.items()}
            dual[local] = forward_ad.make_dual(dual[local], direction)
            moved = [forward_ad.unpack_dual(y) for y in self._outputs(dual)]
        if trial.error is not None:
            return None
        # The module is run again with gradients on, and DoRA's parts ask for gradients themselves.
        return [
            torch.zeros_like(y.primal) if y.tangent is None else y.tangent.detach() for y in moved
        ]

    def _outputs(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        """The tensors that the module returns with `leaves` as parameters, before others' hooks."""
        returned: list[Any] = []

        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            returned.append(output)

        handle = self.module.register_forward_hook(see, prepend=True)
        token = REPLAYING.set(True)
        try:
            with torch.enable_grad(), self.inputs.precision(), eagerly(self.module):
                # Not tied: a child's use of a shared parameter is in the child's own factors.
                functional_call(
                    self.module, leaves, self.inputs.args, self.inputs.kwargs, tie_weights=False
                )
        finally:
            REPLAYING.reset(token)
            handle.remove()
        return tensors_of(returned[-1])


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether two results of one computation differ by no more than the order of sums explains."""
    x, y = x.detach(), y.detach()
    if x.shape != y.shape or torch.equal(x, y):
        return x.shape == y.shape
    bound = y.abs().nan_to_num().max() * torch.finfo(y.dtype).eps * 100
    return bool(((x - y).abs() <= bound).logical_or(x.isnan() & y.isnan()).all())


def _nth(
    vjp: Callable[[int | None], tuple[Tensor | None, ...]], k: int, leaf: Tensor
) -> Callable[[int | None], Tensor]:
    def gradient(i: int | None) -> Tensor:
        grad = vjp(i)[k]
        return torch.zeros_like(leaf) if grad is None else grad

    return gradient

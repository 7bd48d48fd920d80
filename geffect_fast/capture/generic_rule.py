"""The rule for any module: the module is run again, and one vjp is taken for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        if not all(map(_same_up_to_order, again, self.returned)):
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
        names, n = [*leaves], segments.n_samples
        groups = _in_groups([leaf.numel() for leaf in leaves.values()], n)
        formed: dict[tuple[str, int | None], Tensor] = {}

        def vjp(local: str, group: list[str], i: int | None) -> Tensor:
            """One parameter's gradient of sample `i`; for None that of all samples together.

            Those of other parameters and samples that the same backwards give are kept until
            another one is asked for.
            """
            if (local, i) not in formed:
                formed.clear()
                several = range(n) if len(group) > 1 else [i]
                for each in [None] if i is None else several:
                    asked = names if i is None else group
                    masked = [
                        g if each is None else rows[position].only(g, each)
                        for position, (_, g) in used.items()
                    ]
                    found: Sequence[Tensor | None] = [None] * len(asked)
                    if used:
                        found = torch.autograd.grad(
                            [y for y, _ in used.values()],
                            [leaves[k] for k in asked],
                            masked,
                            retain_graph=True,
                            allow_unused=True,
                        )
                    for k, grad in zip(asked, found, strict=True):
                        formed[k, each] = torch.zeros_like(leaves[k]) if grad is None else grad
            return formed[local, i]

        def jvp(local: str, direction: Tensor) -> list[Tangent] | None:
            moved = self._tangents(leaves, local, direction)
            if moved is None:
                return None
            return [
                Tangent(at.flat(moved[position]), at.flat(used[position][1]), at.cu)
                for position, at in rows.items()
            ]

        for group in ([names[k] for k in each] for each in groups):
            for local in group:
                yield (
                    self.names[local],
                    Explicit(partial(vjp, local, group), partial(jvp, local), n),
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


def _same_up_to_order(x: Tensor, y: Tensor) -> bool:
    """Whether two results of one computation differ by no more than the order of sums explains."""
    x, y = x.detach(), y.detach()
    if x.shape != y.shape or torch.equal(x, y):
        return x.shape == y.shape
    bound = y.abs().nan_to_num().max() * torch.finfo(y.dtype).eps * 100
    return bool(((x - y).abs() <= bound).logical_or(x.isnan() & y.isnan()).all())


def _in_groups(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Numbers of parameters by groups, whose gradients are formed together, `n` of each.

    The gradients of a group of several take no more memory than one gradient of all parameters. One
    backward for each group and sample forms them, in place of one for each parameter and sample.
    """
    groups: list[list[int]] = []
    room = -1
    for k in sorted(range(len(sizes)), key=sizes.__getitem__):
        room -= n * sizes[k]
        if room < 0:
            groups.append([])
            room = sum(sizes) - n * sizes[k]
        groups[-1].append(k)
    return groups

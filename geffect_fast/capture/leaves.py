"""The leaves of a graph: what a backward through it can reach."""

from __future__ import annotations

from torch import Tensor

from geffect_fast.errors import InputError


def leaves_of(y: Tensor) -> list[Tensor]:
    """Every leaf that `y` depends on: a backward to all of them passes by every recorded call.

    Among the leaves are a recorder's own roots and anything else that asks for a gradient (soft
    prompts).

    Raises:
        InputError: a part of the graph is made during the backward only.
    """
    seen, todo, leaves = set(), [y.grad_fn] if y.grad_fn is not None else [], []
    while todo:
        node = todo.pop()
        if node in seen:  # reached twice before its turn
            continue
        seen.add(node)
        kind = type(node).__name__
        if kind == "CheckpointFunctionBackward":
            raise InputError(
                "model: it calls torch.utils.checkpoint with use_reentrant=True, which gives no "
                "gradients of activations; call it with use_reentrant=False"
            )
        todo += [n for n, _ in node.next_functions if n is not None and n not in seen]
        if kind == "AccumulateGrad":
            leaves.append(node.variable)  # type: ignore[attr-defined]
    return leaves

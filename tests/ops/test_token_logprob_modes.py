"""token_logprob under function transforms, forward mode and compilation, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from logprob_cases import (
    CASES,
    MODULE,
    TilingOf,
    case,
    plain,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geffect_fast import ops
from geffect_fast.errors import InputError


def test_function_transforms() -> None:
    given_case = CASES["everything"]
    primals = tuple(given_case.floats)
    tangents = tuple(torch.ones_like(t) for t in primals)

    def ours(*tensors: Tensor) -> Tensor:
        return given_case.like(list(tensors)).run()

    def theirs(*tensors: Tensor) -> Tensor:
        return given_case.like(list(tensors)).run(plain)

    torch.testing.assert_close(
        torch.func.jvp(ours, primals, tangents), torch.func.jvp(theirs, primals, tangents)
    )
    argnums = (0, 1, 2)
    for one, other in zip(
        torch.func.grad(lambda *t: ours(*t).sum(), argnums)(*primals),
        torch.func.grad(lambda *t: theirs(*t).sum(), argnums)(*primals),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_forward_mode_along_parameters_that_require_grad() -> None:
    hidden, weight, labels, *_ = CASES["plain"]
    weight = weight.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        found, expected = (
            forward_ad.unpack_dual(function(hidden, dual, labels)).tangent
            for function in (ops.token_logprob, plain)
        )
    torch.testing.assert_close(found, expected)


def _second_backward(x: Tensor, f: Callable) -> None:
    (first,) = torch.autograd.grad(f(x.requires_grad_()).sum(), x, create_graph=True)
    torch.autograd.grad(first.sum(), x)


def _backward_of_tangent(x: Tensor, f: Callable) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        torch.autograd.grad(forward_ad.unpack_dual(f(dual)).tangent.sum(), x)


@pytest.mark.parametrize(
    "second",
    [
        _second_backward,
        _backward_of_tangent,
        lambda x, f: torch.func.grad(lambda y: torch.func.grad(lambda z: f(z).sum())(y).sum())(x),
        lambda x, f: torch.func.jvp(torch.func.grad(lambda y: f(y).sum()), (x,), (x,)),
        lambda x, f: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (x,))[1], (x,), (x,)),
    ],
)
def test_second_derivatives_are_refused(second: Callable) -> None:
    hidden, weight, labels, *_ = CASES["plain"]
    with pytest.raises(InputError, match=r"^token_logprob: .*first derivatives only"):
        second(hidden.clone(), lambda x: ops.token_logprob(x, weight, labels))


def test_compiled_call_equals_eager() -> None:
    given_case = CASES["everything"]
    weights = torch.linspace(0, 1, len(given_case.labels), dtype=torch.float64)
    compiled = torch.compile(ops.token_logprob, backend="aot_eager")
    for one, other in zip(
        given_case.with_gradients(weights, compiled),
        given_case.with_gradients(weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# ---- memory ----


class Largest(TorchDispatchMode):
    """Remembers the largest memory that any operation allocates for a result."""

    def __init__(self, ignored: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.ignored, self.n_bytes, self.known = ignored, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_dense(t)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in filter(is_dense, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in inputs and not self.ignored(tensor):
                self.n_bytes = max(self.n_bytes, storage.nbytes())
        return out


def is_dense(value: object) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_larger_than_a_tile_is_made(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all logits, nor a row of them, nor the whole weight in fp32."""
    budget = 64 * 1024
    monkeypatch.setitem(MODULE.TILING, "cpu", TilingOf(budget, 32))
    given_case = case(300, 64, 20000).to(dtype)
    hidden, weight = given_case.hidden.requires_grad_(), given_case.weight.requires_grad_()

    def is_result(tensor: Tensor) -> bool:
        return tensor.shape == hidden.shape or (
            tensor.shape == weight.shape and tensor.dtype == weight.dtype
        )

    with ops.force_reference(), Largest(is_result) as forward:
        out = given_case.run()
    assert budget / 4 <= forward.n_bytes <= budget
    with ops.force_reference(), Largest(is_result) as backward:
        out.backward(torch.ones_like(out))
    # The derivative of a block of the weight is summed in fp32, too.
    assert backward.n_bytes <= (4 if dtype == torch.float32 else 8) * budget
    with ops.force_reference(), Largest(is_result) as tangent:
        torch.func.jvp(
            lambda h: ops.token_logprob(h, weight.detach(), given_case.labels),
            (hidden.detach(),),
            (hidden.detach(),),
        )
    assert tangent.n_bytes <= budget

"""Requirements of torch on an op (opcheck), wrong calls, and refusal of missing derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_samples import Maker, sample_inputs
from torch.autograd import forward_ad

import geffect_fast
from geffect_fast import ops
from geffect_fast.errors import InputError
from geffect_fast.ops import schema

MAKE = Maker(torch.float32)
A, G, CU = MAKE.rows([3, 0, 4], 5, 6)
V = MAKE(2, 6, 5)
Z = MAKE(2, 7, 6)
GRADS = [[MAKE(3, 2), MAKE(4)], [MAKE(3, 2), MAKE(4)]]

CANONICAL = {
    "multi_tensor_gram": ([t for tensors in GRADS for t in tensors], 2, [1, 0], 2),
    "segment_bilinear": (A, G, V, CU),
    "segment_dot": (Z, Z + 1, CU),
    "ghost_norm": (A, G, CU),
    "ghost_dot": (A, G, CU, A[:4], G[:4], CU.new_tensor([0, 4])),
}


def test_table_covers_every_op() -> None:
    assert {sample.op for sample in sample_inputs(torch.float32)} == set(schema.SCHEMAS)
    assert set(CANONICAL) == set(schema.SCHEMAS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_opcheck(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(arg: object) -> object:
        if isinstance(arg, list):
            return [convert(item) for item in arg]
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            return arg.to(dtype)
        return arg

    args = tuple(convert(arg) for arg in CANONICAL[op])
    torch.library.opcheck(getattr(torch.ops.geffect_fast, op).default, args)


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_opcheck_of_the_reference_as_kernel(op: str) -> None:
    """The reference serves other devices under the same schema: no aliasing, no mutation."""
    name = f"reference_{op}"
    with torch.library._scoped_library("geffect_fast_test", "FRAGMENT") as library:
        library.define(name + schema.SCHEMAS[op])
        library.impl(name, schema.REFERENCES[op], "CompositeExplicitAutograd")
        torch.library.register_fake(f"geffect_fast_test::{name}", schema.FAKES[op], lib=library)
        torch.library.opcheck(
            getattr(torch.ops.geffect_fast_test, name).default,
            CANONICAL[op],
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_reverse_mode_is_refused(op: str, provider: str) -> None:
    sample = next(s for s in sample_inputs(torch.float32) if s.op == op)
    args = [_first_requires_grad(sample.args[0]), *sample.args[1:]]
    function = getattr(ops, op)
    with pytest.raises(InputError, match=f"^{op}: .*requires grad.*no_grad"):
        function(*args)
    with torch.no_grad():
        # The clone may lie otherwise in memory, and round otherwise.
        torch.testing.assert_close(function(*args), function(*sample.args))


def _first_requires_grad(arg: object) -> object:
    if isinstance(arg, list):
        return [_first_requires_grad(arg[0]), *arg[1:]]
    return arg.detach().clone().requires_grad_()


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_forward_mode_is_refused(op: str, provider: str) -> None:
    """A custom op would return zero tangents and no error."""
    sample = next(s for s in sample_inputs(torch.float64) if s.op == op)

    def call(first: torch.Tensor) -> torch.Tensor:
        given = [[first, *sample.args[0][0][1:]], *sample.args[0][1:]] if nested else first
        return getattr(ops, op)(given, *sample.args[1:])

    nested = isinstance(sample.args[0], list)
    first = sample.args[0][0][0] if nested else sample.args[0]
    with pytest.raises(InputError, match=f"^{op}: .*forward-mode"):
        torch.func.jvp(call, (first,), (torch.ones_like(first),))
    with pytest.raises(InputError, match=f"^{op}: .*forward-mode"):  # as the forward engine runs
        torch.vmap(lambda t: torch.func.jvp(call, (first,), (t,))[1])(torch.ones(2, *first.shape))
    with forward_ad.dual_level(), pytest.raises(InputError, match=f"^{op}: .*forward-mode"):
        call(forward_ad.make_dual(first, torch.ones_like(first)))


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_reference_called_directly_has_derivatives(op: str) -> None:
    """The error of forward mode points users to the reference."""
    args = CANONICAL[op]
    first = (args[0][0] if isinstance(args[0], list) else args[0]).double()

    def call(x: torch.Tensor) -> torch.Tensor:
        rest = [
            [t.double() for t in arg] if isinstance(arg, list) and i == 0
            else arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point()
            else arg
            for i, arg in enumerate(args)
        ]  # fmt: skip
        head = [x, *rest[0][1:]] if isinstance(args[0], list) else x
        return schema.REFERENCES[op](head, *rest[1:])

    torch.autograd.gradcheck(call, (first.requires_grad_(),), check_forward_ad=True)


def test_compiled_call_equals_eager() -> None:
    compiled = torch.compile(lambda: ops.segment_dot(Z, Z, CU), backend="aot_eager")
    torch.testing.assert_close(compiled(), ops.segment_dot(Z, Z, CU))


class NotATensor:
    pass


SPARSE = torch.eye(7, 5).to_sparse()

BAD: list[tuple[str, Callable[[], object], str]] = [
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G, V.double(), CU), "`v`.*dtype"),
    (
        "segment_bilinear",
        lambda: ops.segment_bilinear(A.bfloat16(), G.bfloat16(), V, CU),
        "`v`.*dtype",
    ),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G.half(), V, CU), "`g`.*dtype"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G[:-1], V, CU), "`g` has 6.*7"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G, V[:, :-1], CU), "`v`.*d_out"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G, V[..., :-1], CU), "`v`.*d_in"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G, V[0, 0], CU), "`v`.*dimensions"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A[0], G, V, CU), "`a`.*dimensions"),
    ("segment_bilinear", lambda: ops.segment_bilinear(NotATensor(), G, V, CU), "`a`.*NotATensor"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A.int(), G, V, CU), "`a`.*int32"),
    ("segment_bilinear", lambda: ops.segment_bilinear(SPARSE, G, V, CU), "`a`.*dense"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G, V, CU.float()), "`cu_seqlens`.*int32"),
    ("segment_bilinear", lambda: ops.segment_bilinear(A, G, V, [0, 7]), "`cu_seqlens`.*list"),
    ("segment_dot", lambda: ops.segment_dot(Z, Z[..., :-1], CU), "`g`.*\\(d\\)"),
    ("segment_dot", lambda: ops.segment_dot(Z, Z[:, 1:], CU), "`g`.*total_tokens"),
    ("segment_dot", lambda: ops.segment_dot(Z, Z.double(), CU), "`g`.*dtype"),
    ("segment_dot", lambda: ops.segment_dot(Z[0, 0], Z, CU), "`z`.*dimensions"),
    ("segment_dot", lambda: ops.segment_dot(Z, Z, CU[None]), "`cu_seqlens`.*shape"),
    ("segment_dot", lambda: ops.segment_dot(Z, Z, CU[:0]), "`cu_seqlens`.*shape"),
    ("ghost_norm", lambda: ops.ghost_norm(A, G, CU + 1), "`cu_seqlens`.*start at 0"),
    ("ghost_norm", lambda: ops.ghost_norm(A, G, CU[:-1]), "`cu_seqlens`.*end at.*7.*got 3"),
    (
        "ghost_norm",
        lambda: ops.ghost_norm(A, G, torch.tensor([0, 5, 3, 7])),
        "`cu_seqlens`.*decrease",
    ),
    ("ghost_norm", lambda: ops.ghost_norm(A, G.to("meta"), CU), "`g` is on meta"),
    ("ghost_norm", lambda: ops.ghost_norm(A, [], CU), "`g` is an empty list; give"),
    ("ghost_norm", lambda: ops.ghost_norm(A, [G, G[:5]], CU), "`g` has 5 along dimension 0"),
    ("ghost_norm", lambda: ops.ghost_norm(A, G, CU.to("meta")), "`cu_seqlens` is on meta"),
    ("ghost_dot", lambda: ops.ghost_dot(A, G, CU, A[:, 1:], G, CU), "`a2`.*d_in"),
    ("ghost_dot", lambda: ops.ghost_dot(A, G, CU, A, G[:, 1:], CU), "`g2`.*d_out"),
    ("ghost_dot", lambda: ops.ghost_dot(A, G, CU, A, G[1:], CU), "`g2`.*total_tokens"),
    ("ghost_dot", lambda: ops.ghost_dot(A, G, CU, A.half(), G.half(), CU), "`a2`.*dtype"),
    ("ghost_dot", lambda: ops.ghost_dot(A, G, CU, A, G, CU[1:]), "`cu_seqlens2`.*start"),
    ("multi_tensor_gram", lambda: ops.multi_tensor_gram([]), "`grads` is empty"),
    (
        "multi_tensor_gram",
        lambda: ops.multi_tensor_gram([GRADS[0], GRADS[1][:1]]),
        r"`grads\[1\]` has 1",
    ),
    (
        "multi_tensor_gram",
        lambda: ops.multi_tensor_gram([GRADS[0], GRADS[1][::-1]]),
        r"`grads\[1\]\[0\]`.*shape",
    ),
    (
        "multi_tensor_gram",
        lambda: ops.multi_tensor_gram([GRADS[0], [GRADS[1][0], GRADS[1][1].half()]]),
        r"`grads\[1\]\[1\]`.*dtype",
    ),
    ("multi_tensor_gram", lambda: ops.multi_tensor_gram(GRADS, [0]), "`groups`.*1 groups for 2"),
    ("multi_tensor_gram", lambda: ops.multi_tensor_gram(GRADS, [0, -1]), "`groups`.*-1"),
    (
        "multi_tensor_gram",
        lambda: ops.multi_tensor_gram(GRADS, [0, 2], n_groups=2),
        "`groups`.*0..1",
    ),
    ("multi_tensor_gram", lambda: ops.multi_tensor_gram(GRADS, [0, 1.0]), "`groups`.*integers"),
]


@pytest.mark.parametrize(("op", "call", "message"), BAD, ids=range(len(BAD)))
def test_wrong_call_names_op_and_argument(op: str, call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=f"^{op}: {message}") as caught:
        call()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, geffect_fast.errors.GEffectError)


@pytest.mark.parametrize("op", ["ghost_norm", "segment_dot", "segment_bilinear", "ghost_dot"])
@pytest.mark.parametrize("offsets", [[0, 9], [1, 7], [0, 8, 7], [0, -1, 7]])
def test_unchecked_call_with_wrong_offsets_is_an_error(op: str, offsets: list[int]) -> None:
    """A native kernel is memory-safe even when called past the checks."""
    if not geffect_fast.ops.backend.has_native(op, "cpu"):
        pytest.skip("no native kernel here")
    args = [torch.tensor(offsets) if arg is CU else arg for arg in CANONICAL[op]]
    with pytest.raises(RuntimeError, match=f"{op}: `cu_seqlens`"):
        getattr(torch.ops.geffect_fast, op)(*args)

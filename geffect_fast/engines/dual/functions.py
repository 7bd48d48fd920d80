"""Rules by which the functions that language models are written in follow a `Dual`.

A linear function acts on the stack; `d` below is a tangent. Rules of costly functions (products,
attention, norms) are in `layers` and `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual.tensor import Dual, constant, lead, rule, write

aten = torch.ops.aten


def both(name: str) -> tuple[Any, ...]:
    """The function of torch and the method of `Tensor` with a name, as far as they exist."""
    return tuple(f for f in (getattr(torch, name, None), getattr(Tensor, name, None)) if f)


# ---- results that do not move with their input ----

_CONSTANT = (
    *("gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "isfinite", "logical_not", "sign"),
    *("argmax", "argmin", "argsort", "any", "all", "equal", "allclose", "nonzero", "item"),
    *("tolist", "numpy", "is_floating_point", "is_complex", "is_tensor", "is_contiguous", "stride"),
    *("get_device", "element_size", "nelement", "storage_offset", "data_ptr", "detach"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
    *("__bool__", "__int__", "__float__", "__repr__", "__format__", "__contains__"),
)
_ATTRIBUTES = (
    *("dtype", "device", "layout", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "itemsize"),
    *("is_sparse", "is_quantized", "is_nested", "requires_grad", "grad", "grad_fn", "is_leaf"),
    *("data", "names"),
)


def _register_constants() -> None:
    functions = [f for name in _CONSTANT for f in both(name)]
    functions += [getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)]
    for func in functions:
        rule(func)(_of_value(func))


def _of_value(func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: func(*constant(args), **constant(kwargs))


_register_constants()


# ---- shapes ----


def mapped(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The dual after a linear `change`, which acts on everything behind a leading axis."""
    if not isinstance(x, Dual):
        return NotImplemented
    if x.whole is not None:
        return Dual.of(change(x.whole))
    return Dual(change(x.primal[None])[0], change(x.tangents))


def pieces(x: Any, cut: Callable[[Tensor], Sequence[Tensor]]) -> Any:
    """As `mapped`, for a function with several results."""
    if not isinstance(x, Dual):
        return NotImplemented
    if x.whole is not None:
        return tuple(map(Dual.of, cut(x.whole)))
    pairs = zip(cut(x.primal[None]), cut(x.tangents), strict=True)
    return tuple(Dual(p[0], t) for p, t in pairs)


def _at(dim: Any) -> Any:
    """A dimension, or several, as counted with the leading axis."""
    if isinstance(dim, int):
        return dim if dim < 0 else dim + 1
    return tuple(map(_at, dim))


def _given(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sizes given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@rule(Tensor.view, *both("reshape"))
def _reshape(x: Any, *shape: Any) -> Any:
    if isinstance(shape[0], torch.dtype):
        return NotImplemented
    sizes = _given(shape)
    return mapped(x, lambda s: s.reshape(len(s), *sizes))


@rule(Tensor.expand)
def _expand(x: Any, *shape: Any) -> Any:
    sizes = _given(shape)
    return mapped(x, lambda s: lead(s, len(sizes)).expand(len(s), *sizes))


@rule(*both("transpose"), *both("swapaxes"))
def _transpose(x: Any, dim0: int, dim1: int) -> Any:
    return mapped(x, lambda s: s.transpose(_at(dim0), _at(dim1)))


@rule(*both("permute"))
def _permute(x: Any, *dims: Any) -> Any:
    return mapped(x, lambda s: s.permute(0, *_at(_given(dims))))


@rule(Tensor.mT.__get__, Tensor.T.__get__, *both("t"))  # type: ignore[attr-defined]
def _matrix_transpose(x: Any) -> Any:
    return mapped(x, lambda s: s.mT) if x.dim() == 2 else NotImplemented


@rule(*both("flatten"))
def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    return (
        mapped(x, lambda s: s.flatten(_at(start_dim), _at(end_dim))) if x.dim() else NotImplemented
    )


@rule(*both("unsqueeze"))
def _unsqueeze(x: Any, dim: int) -> Any:
    return mapped(x, lambda s: s.unsqueeze(_at(dim)))


@rule(*both("squeeze"))
def _squeeze(x: Any, dim: Any = None) -> Any:
    return NotImplemented if dim is None else mapped(x, lambda s: s.squeeze(_at(dim)))


@rule(*both("chunk"))
def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return pieces(x, lambda s: s.chunk(chunks, _at(dim)))


@rule(*both("split"))
def _split(x: Any, split_size: Any, dim: int = 0) -> Any:
    return pieces(x, lambda s: s.split(split_size, _at(dim)))


@rule(*both("unbind"))
def _unbind(x: Any, dim: int = 0) -> Any:
    return pieces(x, lambda s: s.unbind(_at(dim)))


@rule(*both("index_select"))
def _index_select(x: Any, dim: int, index: Tensor) -> Any:
    return mapped(x, lambda s: s.index_select(_at(dim), index))


@rule(Tensor.__getitem__)
def _getitem(x: Any, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    lists = [isinstance(i, Tensor | list | bool) for i in index]
    if sum(lists) > 1 or any(isinstance(i, bool | Dual) for i in index):
        return NotImplemented  # with several lists, the place of their axis depends on the others
    behind = (slice(None), *index)
    return mapped(x, lambda s: s[behind])


@rule(Tensor.__setitem__)
def _setitem(x: Any, index: Any, value: Any) -> Any:
    if not isinstance(x, Dual) or isinstance(index, Dual):
        return NotImplemented
    write(x, index, value)
    return None


@rule(*both("clone"))
def _clone(x: Any, **_: Any) -> Any:
    return mapped(x, torch.clone)


@rule(Tensor.contiguous)
def _contiguous(x: Any, **_: Any) -> Any:
    return mapped(x, Tensor.contiguous)


@rule(Tensor.requires_grad_)
def _itself(x: Any, *_: Any) -> Any:
    return x


@rule(Tensor.to)
def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = constant(args), constant(kwargs)
    return mapped(x, lambda s: s.to(*args, **kwargs))


@rule(Tensor.type_as)
def _type_as(x: Any, other: Tensor) -> Any:
    return mapped(x, lambda s: s.to(constant(other).dtype))


for _method in (Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16):
    rule(_method)(lambda x, _own=_method: mapped(x, _own))


@rule(*both("cat"), torch.concat)
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    stacks = _stacks(tensors)
    return stacks if stacks is NotImplemented else Dual.of(torch.cat(stacks, _at(dim)))


@rule(torch.stack)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    stacks = _stacks(tensors)
    return stacks if stacks is NotImplemented else Dual.of(torch.stack(stacks, _at(dim)))


def _stacks(tensors: Sequence[Tensor]) -> Any:
    """The stacks of several tensors, some of which may not move."""
    # an empty cache is left out
    tensors = [x for x in tensors if isinstance(x, Dual) or x.shape != (0,)]
    if len({x.dtype for x in tensors}) > 1:
        return NotImplemented
    n = next(len(x.tangents) for x in tensors if isinstance(x, Dual))
    return [
        x.stack
        if isinstance(x, Dual)
        else torch.cat([x[None], x.new_zeros(()).expand(n, *x.shape)])
        for x in tensors
    ]


@rule(*both("sum"))
def _sum(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    over = _at(tuple(range(x.dim())) if dim is None else dim)
    return mapped(x, lambda s: s.sum(over, keepdim, dtype=dtype)) if x.dim() else NotImplemented


@rule(*both("mean"))
def _mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    over = _at(tuple(range(x.dim())) if dim is None else dim)
    return mapped(x, lambda s: s.mean(over, keepdim, dtype=dtype)) if x.dim() else NotImplemented


@rule(*both("index_copy"))
def _index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    if isinstance(x, Dual) or not isinstance(source, Dual):
        return NotImplemented
    still = x.new_zeros(()).expand(len(source.tangents), *x.shape)
    tangents = still.index_copy(dim + 1 if dim >= 0 else dim, index, source.tangents)
    return Dual(x.index_copy(dim, index, source.primal), tangents)


@rule(*both("masked_fill"))
def _masked_fill(x: Any, mask: Tensor, value: Any) -> Any:
    if not isinstance(x, Dual) or isinstance(value, Tensor) or mask.dim() > x.dim():
        return NotImplemented
    return Dual(x.primal.masked_fill(mask, value), x.tangents.masked_fill(mask, 0))


@rule(F.dropout)
def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training and p else input


# ---- sums and products ----


def _promoted_alike(*given: Any) -> bool:
    """Whether an operation on stacks gives the dtype that it gives on the tensors.

    The dtype of a scalar counts less in promotion, and a stack of scalars is no scalar.
    """
    return not any(isinstance(x, complex) or (isinstance(x, Dual) and not x.dim()) for x in given)


def _broadcast(tangents: Tensor, y: Tensor) -> Tensor:
    """The tangents of one summand, in the dtype and shape of the sum `y`."""
    tangents = tangents.to(y.dtype)
    if tangents.shape[1:] == y.shape:
        return tangents
    return lead(tangents, y.dim()).expand(len(tangents), *y.shape)


@rule(*both("add"))
def _add(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    if not _promoted_alike(x, y):
        return NotImplemented
    if isinstance(x, Dual) and isinstance(y, Dual):
        n = max(x.dim(), y.dim())
        return Dual.of(torch.add(lead(x.stack, n), lead(y.stack, n), alpha=alpha))
    value = torch.add(constant(x), constant(y), alpha=alpha)
    if isinstance(x, Dual):
        return Dual(value, _broadcast(x.tangents, value))
    return Dual(value, _broadcast(y.tangents if alpha == 1 else y.tangents * alpha, value))


@rule(*both("sub"), *both("subtract"))
def _sub(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    return _add(x, y, alpha=-alpha)


@rule(*both("rsub"), Tensor.__rsub__)
def _rsub(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    return _add(y, x, alpha=-alpha)


@rule(*both("neg"))
def _neg(x: Any) -> Any:
    return mapped(x, torch.neg)


@rule(*both("mul"), *both("multiply"))
def _mul(x: Any, y: Any) -> Any:
    """`(x y)' = x' y + x y'`, where `x' y` is computed together with the value."""
    if not _promoted_alike(x, y):
        return NotImplemented
    if not isinstance(x, Dual) or (isinstance(y, Dual) and x.whole is None):
        x, y = y, x
    if not isinstance(y, Dual):
        n = y.dim() if isinstance(y, Tensor) else 0
        return mapped(x, lambda s: lead(s, n) * y)
    n = max(x.dim(), y.dim())
    out = lead(x.stack, n) * y.primal
    out[1:].addcmul_(x.primal.to(out.dtype), lead(y.tangents, n).to(out.dtype))
    return Dual.of(out)


@rule(*both("div"), *both("true_divide"))
def _div(x: Any, y: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None or isinstance(y, Dual) or not _promoted_alike(x, y):
        return NotImplemented
    n = y.dim() if isinstance(y, Tensor) else 0
    return mapped(x, lambda s: lead(s, n) / y)


@rule(*both("matmul"), Tensor.__matmul__, *both("bmm"), *both("mm"))
def _matmul(x: Any, y: Any) -> Any:
    if x.dim() < 2 or y.dim() < 2:
        return NotImplemented
    out = None
    if isinstance(x, Dual):
        wide = x.stack
        if wide.dim() <= y.dim():
            wide = lead(wide, y.dim())
        out = wide @ constant(y)
    if isinstance(y, Dual):
        own, n = constant(x), max(x.dim(), y.dim())
        if out is None:
            return Dual(own @ y.primal, own @ lead(y.tangents, n))
        out[1:] += own @ lead(y.tangents, n)
    return Dual.of(out)  # type: ignore[arg-type]


# ---- elementwise, by the slope that torch's own backward multiplies with ----

TangentOf = Callable[..., Tensor]
"""Maps `(d, x, y)` to the tangent of `y = f(x)`."""

_POINTWISE: list[tuple[tuple[Any, ...], TangentOf]] = [
    ((*both("tanh"), F.tanh), lambda d, x, y: aten.tanh_backward(d, y)),
    ((*both("sigmoid"), F.sigmoid), lambda d, x, y: aten.sigmoid_backward(d, y)),
    ((F.silu,), lambda d, x, y: aten.silu_backward(d, x)),
    ((*both("relu"), F.relu), lambda d, x, y: aten.threshold_backward(d, y, 0)),
    (both("exp"), lambda d, x, y: d * y),
    (both("log"), lambda d, x, y: d / x),
    (both("rsqrt"), lambda d, x, y: d * (y.pow(3) * -0.5)),
    (both("sqrt"), lambda d, x, y: d / (2 * y)),
    (both("square"), lambda d, x, y: d * (2 * x)),
]


def _pointwise(func: Any, tangent: TangentOf) -> Callable[..., Any]:
    def serve(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or any(kwargs.values()) or not isinstance(x, Dual):
            return NotImplemented
        y = func(x.primal)
        return Dual(y, tangent(x.tangents, x.primal, y))

    return serve


for _functions, _tangent in _POINTWISE:
    for _function in _functions:
        rule(_function)(_pointwise(_function, _tangent))


@rule(F.gelu)
def _gelu(input: Any, *, approximate: str = "none") -> Any:
    x, tangents = input.primal, input.tangents
    # on a CPU gelu_backward wants both arguments of one shape
    slope = aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    return Dual(F.gelu(x, approximate=approximate), tangents * slope)


@rule(*both("pow"))
def _pow(x: Any, exponent: Any) -> Any:
    if not isinstance(x, Dual) or not isinstance(exponent, int | float) or not exponent:
        return NotImplemented
    slope = x.primal if exponent == 2 else x.primal.pow(exponent - 1)
    return Dual(x.primal.pow(exponent), x.tangents * (slope * exponent))


@rule(*both("softmax"))
def _softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    """`y' = y (x' - sum(y x'))`."""
    if not x.dim():
        return NotImplemented
    y = x.primal.softmax(dim, dtype=dtype)
    out = x.tangents.to(y.dtype) * y
    back = dim if dim < 0 else dim - x.dim()
    return Dual(y, out.addcmul_(y, out.sum(back, keepdim=True), value=-1))


@rule(F.softmax)
def _softmax_of_functional(
    input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Any:
    return NotImplemented if dim is None else _softmax(input, dim, dtype)

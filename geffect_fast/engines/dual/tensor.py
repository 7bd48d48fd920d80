"""A tensor that carries its tangents along, and the way functions of torch follow it.

A `Dual` stands in a model for a tensor `x` that moves. The dual holds the value and the tangents
along M directions, one behind the other in a *stack* `(1 + M, *shape)`. A linear function acts on
the stack in one call, so there are as many calls as in the plain model; other functions have a rule
(`functions`, `rule`). A function without a rule is differentiated by the framework, that function
alone. Shape, dtype and device are those of `x`, so a model's code runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Size, Tensor
from torch.func import jvp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from geffect_fast.errors import in_one_line
from geffect_fast.trying import no_memory


class NoRuleError(Exception):
    """A model cannot be followed with duals, so the framework is to run it."""


class Dual(Tensor):
    """A tensor and its tangents.

    A dual has no storage of its own: code that reads a dual past the functions of torch raises
    `NoRuleError`, instead of going on with the value alone.

    Attributes:
        whole: value and tangents `(1 + M, *shape)`; None where they lie apart, as a parameter's.
    """

    whole: Tensor | None
    _primal: Tensor | None
    _tangents: Tensor | None
    _size: Size

    @staticmethod
    def __new__(
        cls, primal: Tensor | None, tangents: Tensor | None, whole: Tensor | None = None
    ) -> Dual:
        given = primal if whole is None else whole
        assert given is not None
        size = given.shape if whole is None else given.shape[1:]
        self: Dual = Tensor._make_wrapper_subclass(
            cls, size, dtype=given.dtype, device=given.device
        )
        self._primal, self._tangents, self.whole, self._size = primal, tangents, whole, size
        return self

    @staticmethod
    def of(whole: Tensor) -> Dual:
        """The dual with the stack `whole`, `(1 + M, *shape)`."""
        return Dual(None, None, whole)

    @property
    def primal(self) -> Tensor:
        """The value."""
        if self._primal is None:
            assert self.whole is not None
            self._primal = self.whole[0]
        return self._primal

    @property
    def tangents(self) -> Tensor:
        """The tangents `(M, *shape)`, in the value's dtype."""
        if self._tangents is None:
            assert self.whole is not None
            self._tangents = self.whole[1:]
        return self._tangents

    @property
    def stack(self) -> Tensor:
        """Value and tangents `(1 + M, *shape)`, not to be written to."""
        if self.whole is not None:
            return self.whole
        return torch.cat([self.primal[None], self.tangents])

    # The properties asked for most often, without the way through torch.

    @property
    def shape(self) -> Size:  # type: ignore[override]
        return self._size

    def size(self, dim: int | None = None) -> Any:
        return self._size if dim is None else self._size[dim]

    def dim(self) -> int:
        return len(self._size)

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self._size)

    def numel(self) -> int:
        return self._size.numel()

    def __len__(self) -> int:
        return self._size[0]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return follow(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        raise NoRuleError(f"{func} reads a tensor without its tangents")


RULES: dict[Any, Callable[..., Any]] = {}
"""The rules by function. A rule takes the function's arguments, some of them duals, and returns the
function's result, or `NotImplemented` where the framework's rule is to serve."""


def rule(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the rule of these functions."""

    def register(serve: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, serve))
        return serve

    return register


def follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function some of whose arguments are duals.

    A result that is computed without gradients is constant, as it is in reverse mode.

    Raises:
        NoRuleError: the function cannot be followed.
    """
    if not torch.is_grad_enabled():
        if changes_its_input(func, kwargs):
            raise NoRuleError(f"{func} without gradients")
        return func(*constant(args), **constant(kwargs))
    serve = RULES.get(func)
    if serve is not None:
        out = serve(*args, **kwargs)
        if out is not NotImplemented:
            return out
    if changes_its_input(func, kwargs):
        return _in_place(func, args, kwargs)
    return _by_framework(func, args, kwargs)


def constant(given: Any) -> Any:
    """The arguments with every dual, also inside containers, replaced by its value."""
    if isinstance(given, Dual):
        return given.primal
    if type(given) in (tuple, list):
        return type(given)(map(constant, given))
    if type(given) is dict:
        return {key: constant(x) for key, x in given.items()}
    return given


def changes_its_input(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into one of its arguments."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or "out" in kwargs or kwargs.get("inplace") is True


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
    """Follow a method that ends in `_` by the method without the `_`."""
    name = func.__name__
    plain = getattr(Tensor, name.removesuffix("_"), None)
    target = args[0] if args else None
    if not name.endswith("_") or plain is None or not isinstance(target, Dual):
        raise NoRuleError(f"{func}: a tensor that does not move is written to")
    result = follow(plain, args, kwargs)
    write(target, ..., result)
    return target


def write(target: Dual, index: Any, value: Any) -> None:
    """Do `target[index] = value`, seen by all views of the target."""
    whole = target.whole
    if whole is None:
        raise NoRuleError("a tensor whose tangents lie apart is written to")
    index = index if isinstance(index, tuple) else (index,)
    behind = (slice(None), *index)
    try:
        if isinstance(value, Dual):
            place = target.primal[index].dim()
            whole[behind] = lead(value.stack, place)
        else:
            target.primal[index] = value
            target.tangents[behind] = 0
    except (RuntimeError, IndexError) as error:
        raise NoRuleError(str(error)) from error


def lead(stack: Tensor, n_dims: int) -> Tensor:
    """A stack whose tensors have at least `n_dims` axes, by axes of size 1 before their own."""
    missing = n_dims + 1 - stack.dim()
    return stack.view(len(stack), *[1] * missing, *stack.shape[1:]) if missing > 0 else stack


def _by_framework(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of one function that torch differentiates along all directions at once."""
    flat, spec = tree_flatten((args, kwargs))
    at = [i for i, x in enumerate(flat) if isinstance(x, Dual)]
    primals = tuple(flat[i].primal for i in at)

    def run(*moving: Tensor) -> Any:
        given = list(flat)
        for i, x in zip(at, moving, strict=True):
            given[i] = x
        own_args, own_kwargs = tree_unflatten(given, spec)
        return func(*own_args, **own_kwargs)

    def along(*tangents: Tensor) -> Any:
        return jvp(run, primals, tangents)[:2]

    try:
        values, tangents = vmap(along, out_dims=(None, 0))(  # type: ignore[arg-type]
            *(flat[i].tangents for i in at)
        )
    except Exception as error:  # a function that knows no duals may raise anything
        if no_memory(error):
            raise
        raise NoRuleError(f"{func}: {in_one_line(error)}") from error
    values, spec = tree_flatten(values)
    tangents = tree_flatten(tangents)[0]
    return tree_unflatten(
        [Dual(x, t) if x.is_floating_point() else x for x, t in zip(values, tangents, strict=True)],
        spec,
    )

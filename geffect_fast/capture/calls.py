"""What one call of one module says about the gradients of its parameters: a rule a module type.

A rule is a class whose line names the module type it serves; `rule_for` picks it only where the
module really runs that type's own forward, so a subclass with another forward gets the exact
generic rule instead of a wrong fast one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from geffect_fast.capture.factors import Explicit, Factor, Lookup, Outer, RowSum
from geffect_fast.capture.products import project
from geffect_fast.capture.segments import Segments


@dataclass
class Call:
    """One call of a module that owns trainable parameters.

    Attributes:
        where: the module's name in the model.
        module: the module.
        names: its trainable parameters, local name (`weight`) to name in the model.
        args, kwargs: what it was called with, detached.
        factor: the one number a rule found out about the module (`fit`).
    """

    where: str
    module: nn.Module
    names: Mapping[str, str]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    factor: float = 1.0

    rules: ClassVar[dict[str, type[Call]]] = {}

    def __init_subclass__(cls, serves: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if serves is not None:
            Call.rules[serves] = cls

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        """The rule's `factor` for this very module, None where its formula is not exact for it."""
        return 1.0 if runs_forward_of(module, cls) else None

    @property
    def input(self) -> Tensor:
        """The one tensor the module was called with."""
        return next(iter((*self.args, *self.kwargs.values())))

    def factors(self, g: Tensor, segments: Segments) -> Iterator[tuple[str, Factor]]:
        """Each parameter's name in the model with its factor, given the output's gradient `g`."""
        raise NotImplementedError

    def constants(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `products.inner` may reuse for every objective: by parameter name, `(M, rows, d)`."""
        return {}


def runs_forward_of(module: nn.Module, rule: type[Call]) -> bool:
    """Whether the module runs the forward of the type that `rule` serves, not one of its own."""
    served = (b for b in type(module).__mro__ if Call.rules.get(_qualified(b)) is rule)
    return any(type(module).forward is base.forward for base in served)  # type: ignore[attr-defined]


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _cu(segments: Segments, x: Tensor, where: str) -> Tensor:
    return segments.rows(x.shape[:-1], where).to(x.device)


class LinearCall(Call, serves="torch.nn.modules.linear.Linear"):
    """`y = a W^T + b`: `grad_W = sum_t g_t a_t^T`, `grad_b = sum_t g_t`."""

    transposed: ClassVar[bool] = False

    def factors(self, g: Tensor, segments: Segments) -> Iterator[tuple[str, Factor]]:
        cu, g = _cu(segments, g, self.where), _flat(g)
        if "weight" in self.names:
            yield self.names["weight"], Outer(_flat(self.input), g, cu, self.transposed)
        if "bias" in self.names:
            yield self.names["bias"], RowSum(g, cu)

    def constants(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self.names.get("weight")
        if name is None:
            return {}
        return {name: project(_flat(self.input), directions[name], self.transposed)}


class Conv1DCall(LinearCall, serves="transformers.pytorch_utils.Conv1D"):
    """GPT-2's linear layer, whose weight is stored as `(d_in, d_out)`."""

    transposed = True


class EmbeddingCall(Call, serves="torch.nn.modules.sparse.Embedding"):
    """`y_t = s W[id_t]`: row `id_t` of the table receives `s g_t`, the padding row nothing."""

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None or module.scale_grad_by_freq:
            return None
        return 1.0 if runs_forward_of(module, cls) else embedding_scale(module)

    @property
    def ids(self) -> Tensor:
        return self.input.reshape(-1)

    def factors(self, g: Tensor, segments: Segments) -> Iterator[tuple[str, Factor]]:
        assert isinstance(self.module, nn.Embedding)
        cu, rows = _cu(segments, g, self.where), _flat(g) * self.factor
        if self.module.padding_idx is not None:
            rows = rows.masked_fill((self.ids == self.module.padding_idx)[:, None], 0)
        yield self.names["weight"], Lookup(self.ids, rows, cu, self.module.num_embeddings)

    def constants(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self.names["weight"]
        return {name: directions[name][:, self.ids]}


def embedding_scale(module: nn.Embedding) -> float | None:
    """The factor `s` of an embedding `y = s W[id]`, or None where it is no such thing.

    Gemma's embeddings multiply by `sqrt(d)`. The factor is the derivative itself, taken by forward
    mode on a table of eight rows, and accepted only where the module is linear with it.
    """
    table = torch.linspace(-1, 1, 8 * module.embedding_dim).view(8, -1).to(module.weight)
    ids = torch.arange(8, device=table.device)

    def look_up(weight: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight}, (ids,))

    try:
        with torch.no_grad():
            y, slope = jvp(look_up, (table,), (torch.ones_like(table),))
            zero = look_up(torch.zeros_like(table))
    except (RuntimeError, TypeError, IndexError):
        return None
    # The row of the padding index receives no tangent, so the slope is read off the others.
    scale = slope.flatten()[slope.abs().argmax()].item()
    linear = torch.allclose(y, table * scale, rtol=1e-2 if y.dtype.itemsize < 4 else 1e-5)
    return scale if linear and not zero.any() else None


class NormCall(Call):
    """`y = xhat(x) * (offset + w) + b`: `grad_w = sum_t g_t * xhat_t`, `grad_b = sum_t g_t`.

    Serves every norm of that form, whatever its name (LayerNorm, the RMSNorms of transformers with
    `w` and with `1 + w`): the form and the offset are found by trying the module, see `norm_offset`.
    """

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        return norm_offset(module)

    def factors(self, g: Tensor, segments: Segments) -> Iterator[tuple[str, Factor]]:
        cu, rows = _cu(segments, g, self.where), _flat(g)
        if "weight" in self.names:
            yield self.names["weight"], RowSum(rows * self.normalized(), cu)
        if "bias" in self.names:
            yield self.names["bias"], RowSum(rows, cu)

    def normalized(self) -> Tensor:
        """`xhat`, `(rows, d)`, computed by the module itself with its weight set to `1 - offset`."""
        weight = torch.full_like(self.module.get_parameter("weight"), 1.0 - self.factor)
        with torch.no_grad():
            return _flat(_norm(self.module, weight, None, *self.args, **self.kwargs))


def _norm(
    module: nn.Module, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    replaced = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        replaced["bias"] = torch.zeros_like(weight) if bias is None else bias
    return functional_call(module, replaced, args, kwargs)


def norm_offset(module: nn.Module) -> float | None:
    """0 for `y = xhat w + b`, 1 for `y = xhat (1 + w) + b`, None for anything else.

    Tried on five random rows against the module with weights 0, 1 and random.
    """
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if weight is None or weight.dim() != 1 or own or any(True for _ in module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.rand(shape, generator=generator, dtype=torch.float64).to(weight) + 0.5
        for shape in ((5, weight.numel()), weight.shape, weight.shape)
    )
    try:
        with torch.no_grad():
            at_zero = _norm(module, torch.zeros_like(w), None, x)
            at_one = _norm(module, torch.ones_like(w), None, x)
            at_random = _norm(module, w, None if bias is None else b, x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not isinstance(at_one, Tensor) or at_one.shape != x.shape:
        return None
    offset, xhat = (1.0, at_zero) if at_zero.any() else (0.0, at_one)
    rtol = 5e-2 if x.dtype.itemsize < 4 else 1e-5
    expected = xhat * (offset + w) + (0 if bias is None else b)
    same = torch.allclose(at_one, xhat * (offset + 1.0), rtol=rtol, atol=rtol)
    return offset if same and torch.allclose(at_random, expected, rtol=rtol, atol=rtol) else None


class GenericCall(Call):
    """Anything else: the module is run once more and its vjp taken, one sample at a time.

    Exact whatever the module does inside, as long as its outputs' rows belong to samples: the
    gradient of sample `i` is the vjp of the output gradient with all other samples' rows zeroed.
    """

    def gradients(
        self, grads: list[Tensor | None], segments: Segments
    ) -> Iterator[tuple[str, Factor]]:
        """The factors, given the gradient of every tensor the module returned (None: unused)."""
        leaves = {k: getattr(self.module, k).detach().requires_grad_() for k in self.names}
        with torch.enable_grad():
            outputs = tensors_of(functional_call(self.module, leaves, self.args, self.kwargs))
        # Outputs behind the last one that received a gradient are not in `grads`.
        used = [(y, g) for y, g in zip(outputs, grads, strict=False) if g is not None]
        cus = [
            segments.rows(g.shape[:-1] if segments.n_samples > 1 else g.shape, self.where)
            for _, g in used
        ]
        formed: dict[int, tuple[Tensor | None, ...]] = {}

        def vjp(i: int) -> tuple[Tensor | None, ...]:
            if i not in formed:
                # Only the last sample is kept: parameters of one module are asked for in turn.
                formed.clear()
                masked = [_only(g, cu, i) for (_, g), cu in zip(used, cus, strict=True)]
                formed[i] = torch.autograd.grad(
                    [y for y, _ in used],
                    list(leaves.values()),
                    masked,
                    retain_graph=True,
                    allow_unused=True,
                )
            return formed[i]

        for k, (local, leaf) in enumerate(leaves.items()):
            yield self.names[local], Explicit(_nth(vjp, k, leaf), segments.n_samples)


def _nth(
    vjp: Callable[[int], tuple[Tensor | None, ...]], k: int, leaf: Tensor
) -> Callable[[int], Tensor]:
    def gradient(i: int) -> Tensor:
        grad = vjp(i)[k]
        return torch.zeros_like(leaf) if grad is None else grad

    return gradient


def _only(g: Tensor, cu: Tensor, i: int) -> Tensor:
    """`g` with the rows of every sample but `i` set to zero."""
    if cu.numel() == 2:
        return g
    kept = torch.zeros_like(g)
    rows = slice(int(cu[i]), int(cu[i + 1]))
    _flat(kept)[rows] = _flat(g)[rows]
    return kept


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating-point tensor in what a module returned, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for item in output for t in tensors_of(item)]
    return []


def rule_for(module: nn.Module) -> tuple[type[Call], float]:
    """The rule that is exact for `module` (its type's own, the norms', or the generic one), and
    the factor it found."""
    if "forward" not in vars(module):
        own = (Call.rules.get(_qualified(base)) for base in type(module).__mro__)
        for rule in (*(r for r in own if r is not None), NormCall):
            factor = rule.fit(module)
            if factor is not None:
                return rule, factor
    return GenericCall, 1.0


def broadcast_ids(module: nn.Module, args: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """Position ids `(1, T)` shared by `n` samples, given to each: the sum over samples is undone."""
    if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor):
        ids = args[0]
        if n > 1 and ids.dim() >= 2 and ids.shape[0] == 1:
            return (ids.expand(n, *ids.shape[1:]), *args[1:])
    return args


def dropout_in_use(model: nn.Module) -> str | None:
    """The first module in train mode whose dropout is not zero, or None."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        rates = {k: v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)}
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates["p"] = module.p
        if any(rate > 0 for rate in rates.values()):
            return name or type(module).__name__
    return None

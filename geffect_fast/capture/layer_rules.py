"""Rules by module type: the factors that one call of a module adds to its parameters' gradients.

A rule is a subclass of `Call` whose class line names the module type it serves. `rule_for`
(`capture/plan.py`) picks it only where the module really runs that type's own forward, so a
subclass with another forward gets the exact generic rule (`capture/generic_rule.py`) instead of a
wrong fast one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from geffect_fast.capture.factors import (
    Factor,
    GramOuter,
    Lookup,
    Outer,
    RowSum,
)
from geffect_fast.capture.inputs import NOTHING, Inputs, version_of
from geffect_fast.capture.probing import (
    embedding_scale,
    is_linear,
    norm_offset,
    norm_with,
)
from geffect_fast.capture.products import project
from geffect_fast.capture.segments import Rows, Segments, segment_product, segment_sum
from geffect_fast.errors import InputError, UnsupportedModelError
from geffect_fast.ops import backend
from geffect_fast.ops.reference import accumulation_dtype
from geffect_fast.precision import widened


@dataclass
class Call:
    """One call of a module that owns trainable parameters.

    Attributes:
        where: the module's name in the model.
        module: the module.
        names: its trainable parameters, local name (`weight`) to name in the model.
        inputs: the arguments of the call.
        fitted: the one number that the rule found out about the module (`fit`).
        segments: the sample axis; None where it is not known.
        axes: the axis of the tokens in modules' outputs, as far as it is known (`Segments.rows`).
    """

    where: str
    module: nn.Module
    names: Mapping[str, str]
    inputs: Inputs
    fitted: float
    segments: Segments | None
    axes: dict[tuple[str, int], int]

    rules: ClassVar[dict[str, type[Call]]] = {}

    def __init_subclass__(cls, serves: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if serves is not None:
            Call.rules[serves] = cls

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        """The rule's `fitted` for this module; None where the rule is not exact for the module."""
        return 1.0 if runs_forward_of(module, cls) else None

    @property
    def input(self) -> Tensor:
        """The one tensor the module was called with."""
        return next(iter((*self.inputs.args, *self.inputs.kwargs.values())))

    def keep(self, output: Any, norm_weights: NormWeights) -> None:
        """Note what the call needs of the output, before any other code changes the output."""

    def condense(self, grams: InputGrams, output: Any) -> bool:
        """Replace the inputs by what norms need of them; return whether that was done."""
        return False

    def factors(self, g: Tensor, rows: Rows) -> Iterator[tuple[str, Factor]]:
        """Each parameter's name in the model with its factor, given the output's gradient `g`."""
        raise NotImplementedError

    def checked_factors(self, g: Tensor) -> Iterator[tuple[str, Factor]]:
        """`factors`, after a check that the sample axis is known and the inputs are unchanged."""
        return self.factors(g, self.rows(self.checked_segments(), g))

    def rows(self, segments: Segments, x: Tensor) -> Rows:
        """The layout of the rows of an input or output `(..., d)`."""
        return segments.rows(x.shape[:-1], self.where, self.axes)

    def checked_segments(self) -> Segments:
        """The sample axis.

        Raises:
            InputError: the sample axis is not known.
            UnsupportedModelError: an input was changed in place after the call.
        """
        if self.segments is None:
            raise InputError(
                f"capture: '{self.where}' ran outside the model's own forward, so its samples are "
                "not known; call the model that was given"
            )
        if self.inputs.changed():
            raise UnsupportedModelError(
                f"module '{self.where}': its input was changed in place after the call and before "
                "the backward; change a copy instead"
            )
        return self.segments

    def constants(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors `(M, rows, d)` by parameter name that `inner` may reuse for every objective."""
        return {}


def runs_forward_of(module: nn.Module, rule: type[Call]) -> bool:
    """Whether the module runs the forward of the type that `rule` serves, not one of its own."""
    served = (b for b in type(module).__mro__ if Call.rules.get(qualified(b)) is rule)
    return any(type(module).forward is vars(base).get("forward") for base in served)


def qualified(kind: type) -> str:
    """A type's name behind its module's name, as keys of `Call.rules` are."""
    return f"{kind.__module__}.{kind.__qualname__}"


MOST_TOKENS = 128 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
"""Most tokens of a sample whose Gram matrix is formed best by dot products; `kShortTokens` of
`ghost_norm.cpp`."""


class InputGrams:
    """The Gram matrices of inputs, formed once for neighbouring layers that share an input.

    They are formed in the forward, where inputs are still in the cache and need not be kept for the
    backward.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Tensor] | None = None

    def of(self, a: Tensor, output: Tensor, rows: Rows) -> Tensor | None:
        """Gram matrices `(sum of T_i^2,)`; None where they outgrow the inputs or no kernel serves.

        Args:
            a: `(..., d_in)`, inputs of a linear layer, detached.
            output: `(..., d_out)`, the layer's output.
            rows: the layout of the rows of `a`.
        """
        longest = max(rows.cu.lengths, default=0)
        if not a.is_cpu or longest > min(MOST_TOKENS, a.shape[-1], output.shape[-1]):
            return None
        if accumulation_dtype(a.dtype) != accumulation_dtype(output.dtype):
            return None
        if backend.reference_is_forced() or not backend.has_native("token_grams", "cpu"):
            return None
        if self._last is not None:
            last, version, grams = self._last
            # `last` is kept: its memory cannot have become another tensor's.
            seen = last.data_ptr(), last.shape, last.stride(), last.dtype, version
            if seen == (a.data_ptr(), a.shape, a.stride(), a.dtype, version_of(a)):
                return grams
        grams = backend.call("token_grams", a.device, rows.flat(a), rows.cu.on(a.device))
        self._last = a, version_of(a), grams
        return grams


@dataclass
class LinearCall(Call, serves="torch.nn.modules.linear.Linear"):
    """`y = a W^T + b`: `grad_W = sum_t g_t a_t^T`, `grad_b = sum_t g_t`.

    Attributes:
        grams: the inputs' Gram matrices, where they are kept in place of the inputs (`condense`).
    """

    transposed: ClassVar[bool] = False

    grams: Tensor | None = None

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        if runs_forward_of(module, cls):
            return 1.0
        return 1.0 if isinstance(module, nn.Linear) and is_linear(module) else None

    def condense(self, grams: InputGrams, output: Any) -> bool:
        if "weight" in self.names:
            rows = self.rows(self.checked_segments(), self.input)
            self.grams = grams.of(self.input, output, rows)
        if self.grams is None:
            return False
        self.inputs = NOTHING
        return True

    def factors(self, g: Tensor, rows: Rows) -> Iterator[tuple[str, Factor]]:
        g = rows.flat(g)
        if self.grams is not None:
            yield self.names["weight"], GramOuter(self.grams, g, rows.cu)
        elif "weight" in self.names:
            a, wide = rows.flat(self.input), g
            if a.dtype != g.dtype:  # under autocast
                dtype = torch.promote_types(a.dtype, g.dtype)
                a, wide = a.to(dtype), g.to(dtype)
            yield self.names["weight"], Outer(a, wide, rows.cu, self.transposed)
        if "bias" in self.names:
            yield self.names["bias"], RowSum(segment_sum(g, rows.cu))

    def constants(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self.names.get("weight")
        if name is None:
            return {}
        a = self.rows(self.checked_segments(), self.input).flat(self.input)
        return {name: project(a, directions[name], self.transposed)}


class Conv1DCall(LinearCall, serves="transformers.pytorch_utils.Conv1D"):
    """GPT-2's linear layer, whose weight is stored as `(d_in, d_out)`."""

    transposed = True


class EmbeddingCall(Call, serves="torch.nn.modules.sparse.Embedding"):
    """`y_t = s W[id_t]`: row `id_t` of the table receives `s g_t`, the padding row nothing."""

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return None
        return 1.0 if runs_forward_of(module, cls) else embedding_scale(module)

    def factors(self, g: Tensor, rows: Rows) -> Iterator[tuple[str, Factor]]:
        assert isinstance(self.module, nn.Embedding)
        ids, g = self.ids(rows), rows.flat(g)
        if self.fitted != 1.0:
            g = g * self.fitted
        if self.module.padding_idx is not None:
            g = g.masked_fill((ids == self.module.padding_idx)[:, None], 0)
        yield self.names["weight"], Lookup(ids, g, rows.cu, len(self.module.weight))

    def ids(self, rows: Rows) -> Tensor:
        return rows.flat(self.input[..., None])[:, 0]

    def constants(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name = self.names["weight"]
        rows = self.rows(self.checked_segments(), self.input[..., None])
        return {name: directions[name][:, self.ids(rows)]}


@dataclass
class NormCall(Call):
    """`y = xhat(x) * (offset + w) + b`: `grad_w = sum_t g_t * xhat_t`, `grad_b = sum_t g_t`.

    The rule serves every norm of that form, whatever its name (LayerNorm, the RMSNorms of
    transformers with `w` and with `1 + w`). Form and offset are found by trying the module, see
    `norm_offset`.

    Attributes:
        output: the module's output and the number of writes to it by then; None where `xhat` cannot
            be read off the output.
        multiplied: `offset + w` of the call, by which `xhat` was multiplied; None where `xhat`
            cannot be read off the output.
    """

    output: tuple[Tensor, int] | None = None
    multiplied: Tensor | None = None

    @classmethod
    def fit(cls, module: nn.Module) -> float | None:
        return norm_offset(module)

    def keep(self, output: Any, norm_weights: NormWeights) -> None:
        # `xhat` cannot be read off an output that was rounded to low precision.
        weight = self.module.get_parameter("weight")
        same = self.input.dtype == weight.dtype == output.dtype and weight.dtype.itemsize >= 4
        if same and output.is_cpu and getattr(self.module, "bias", None) is None:
            self.multiplied = norm_weights.multiplied(self.where)
            if self.multiplied is not None:
                self.output = output.detach(), version_of(output)

    def factors(self, g: Tensor, rows: Rows) -> Iterator[tuple[str, Factor]]:
        g = rows.flat(g)
        if "weight" in self.names:
            yield self.names["weight"], RowSum(self.sums(g, rows))
        if "bias" in self.names:
            yield self.names["bias"], RowSum(segment_sum(g, rows.cu))

    def sums(self, g: Tensor, rows: Rows) -> Tensor:
        """`sum_t g_t * xhat_t`, `(n, d)` fp64, read off the output where that is unchanged."""
        if self.output is not None and version_of(self.output[0]) == self.output[1]:
            assert self.multiplied is not None
            sums = segment_product(g, rows.flat(self.output[0]), rows.cu)
            return sums.div_(self.multiplied)
        return segment_product(g, rows.flat(self.normalized()), rows.cu)

    def normalized(self) -> Tensor:
        """`xhat`, `(..., d)`, computed again by the module with its weight set to `1 - offset`.

        It is computed in fp32 at least. So a norm that computes in fp32 and rounds its result is
        not rounded here.
        """
        x = widened(self.input)
        weight = self.module.get_parameter("weight")
        # Only the weight's shape is used: FSDP may not have its values at hand here.
        ones = torch.full(
            weight.shape, 1.0 - self.fitted, dtype=accumulation_dtype(weight.dtype), device=x.device
        )
        with torch.no_grad(), self.inputs.precision():
            return norm_with(self.module, ones, None, x)


class NormWeights:
    """The multipliers `offset + w` of a model's norms, where `xhat` can be read off the output.

    All of them are looked at together, once for each batch, because looking waits for the
    computation of the weights.

    Args:
        norms: weight and offset of every norm on a CPU, by the module's name.
    """

    def __init__(self, norms: Mapping[str, tuple[Tensor, float]]) -> None:
        self._norms = norms
        self._found: dict[str, Tensor] | None = None

    def multiplied(self, where: str) -> Tensor | None:
        """`offset + w` of the norm at `where`; None where an element is close to zero."""
        if not self._norms:  # FSDP has the weights at hand within a forward only
            return None
        if self._found is None:
            weights = torch._foreach_add(*map(list, zip(*self._norms.values(), strict=True)))
            sizes = torch.stack(torch._foreach_norm(weights, -torch.inf)).tolist()
            self._found = {
                where: weight
                for where, weight, size in zip(self._norms, weights, sizes, strict=True)
                if size > SMALLEST_WEIGHT
            }
        return self._found.get(where)


SMALLEST_WEIGHT = 1e-9
"""Smallest weight of a norm by which its output may be divided. Below it, the output, and even more
so its product with a gradient, may have lost digits to underflow."""

"""Log-probabilities of labels under an lm_head, in tiles of tokens by vocabulary.

Products are torch's; what is done with a tile of them are the ops `token_logprob_rows` (maximum,
sum of exponentials and the label's logit of every row) and `token_logprob_rows_backward`. Logits
exist one tile at a time and are computed again for every derivative.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from geffect_fast.errors import InputError
from geffect_fast.ops import backend
from geffect_fast.ops.reference import accumulation_dtype

IGNORED = -100


class Tiling(NamedTuple):
    """Bytes that a tile of logits, or a block converted for it, may take; tokens of a tile."""

    n_bytes: int
    n_tokens: int


# So small that a tile is still in a cache when its rows are read, so large that the products run at
# full speed: the weight is read once for so many tokens. The numbers for CUDA are not measured yet.
TILING = {"cpu": Tiling(4 * 2**20, 512), "cuda": Tiling(32 * 2**20, 2048)}


def _multiplied_in(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which operands like `tensor` are multiplied.

    cuBLAS multiplies low precision into fp32 results. Elsewhere the result would be rounded, so
    operands are converted, a block at a time: 1 / (tokens of a tile) of the product's own work.
    """
    return tensor.dtype if tensor.is_cuda else accumulation_dtype(tensor.dtype)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return `x y` in the accumulation dtype, not rounded to that of the operands."""
    wide = accumulation_dtype(x.dtype)
    if x.dtype == wide:
        # autocast, which would lower the precision, leaves calls with `out` alone.
        return torch.mm(x, y, out=x.new_empty((x.shape[0], y.shape[1])))
    return torch.mm(x, y, out_dtype=wide)


class Head(NamedTuple):
    """`logits = softcap tanh(scale (hidden weight^T + bias) / softcap)`; softcap 0: no tanh."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float
    softcap: float

    def spans(self) -> tuple[list[slice], list[slice]]:
        """Return the tiles' tokens and vocabulary entries."""
        (n_tokens, d_in), vocabulary = self.hidden.shape, self.weight.shape[0]
        tiling = TILING["cuda" if self.hidden.is_cuda else "cpu"]
        numbers = tiling.n_bytes // accumulation_dtype(self.hidden.dtype).itemsize
        converted = _multiplied_in(self.hidden) != self.hidden.dtype
        most = max(1, numbers // max(1, d_in)) if converted else n_tokens + vocabulary
        rows = max(1, min(n_tokens, tiling.n_tokens, most))
        return _cut(n_tokens, rows), _cut(vocabulary, min(max(1, numbers // rows), most))

    def operand(self, block: Tensor) -> Tensor:
        """Return a block of hidden states or of the weight as it is multiplied."""
        return block.to(_multiplied_in(block))

    def product(self, hidden: Tensor, weight: Tensor, columns: slice) -> Tensor:
        """Return `hidden weight^T + bias` of one tile, its operands already as multiplied."""
        tile = _product(hidden, weight.T)
        return tile if self.bias is None else tile.add_(self.bias[columns])

    def statistics(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return every row's maximum, sum of exponentials and label's logit `(3, tokens)`."""
        return backend.call(
            "token_logprob_rows",
            tile.device,
            tile,
            self.labels[rows],
            columns.start,
            self.scale,
            self.softcap,
        )

    def gradient(
        self,
        tile: Tensor,
        rows: slice,
        columns: slice,
        normaliser: Tensor,
        grad: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the derivative of `sum_t grad_t logprob_t` by one tile's product."""
        return backend.call(
            "token_logprob_rows_backward",
            tile.device,
            tile,
            self.labels[rows],
            columns.start,
            self.scale,
            self.softcap,
            normaliser[:, rows],
            grad[rows],
            dtype,
        )

    def masked(self, per_token: Tensor) -> Tensor:
        """Return 0 for ignored tokens, NaN for labels outside of the vocabulary."""
        outside = (self.labels < 0) | (self.labels >= self.weight.shape[0])
        return per_token.masked_fill(outside, torch.nan).masked_fill(self.labels == IGNORED, 0)


def _cut(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _logprob(head: Head) -> tuple[Tensor, Tensor]:
    """Return log-probabilities `(T,)` and, of the logits' sums, maximum and logarithm `(2, T)`."""
    wide = accumulation_dtype(head.hidden.dtype)
    logprob = head.hidden.new_empty(head.hidden.shape[0], dtype=wide)
    normaliser = head.hidden.new_empty((2, head.hidden.shape[0]), dtype=wide)
    token_spans, vocabulary_spans = head.spans()
    for rows in token_spans:
        hidden = head.operand(head.hidden[rows])
        blocks = []
        for columns in vocabulary_spans:
            tile = head.product(hidden, head.operand(head.weight[columns]), columns)
            blocks.append(head.statistics(tile, rows, columns))
        maxima, sums, label = torch.stack(blocks).unbind(1)
        maximum = maxima.amax(0)
        log_sum = (sums * (maxima - maximum).exp()).sum(0).log()
        # Only one block holds the label; the others say 0.
        logprob[rows] = (label.sum(0) - maximum) - log_sum
        normaliser[0, rows], normaliser[1, rows] = maximum, log_sum
    return head.masked(logprob), normaliser


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add `x y` to `total`, which has the accumulation dtype."""
    if x.dtype == total.dtype:
        total.addmm_(x, y)
    else:
        total += _product(x, y)


def _exponent_for_half(grad: Tensor, scale: float) -> Tensor:
    """Return n such that `2^n scale grad` uses the upper part of float16's range, nothing lost.

    A token's weight times a probability is often below the smallest float16.
    """
    return (12 - torch.frexp((grad * scale).abs().amax()).exponent).clamp(-100, 100)


def _derivative(
    head: Head, normaliser: Tensor, grad: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the derivatives of `sum_t grad_t logprob_t` by hidden, weight and bias."""
    hidden, weight, bias = head.hidden, head.weight, head.bias
    dtype, wide = _multiplied_in(hidden), normaliser.dtype
    grad = head.masked(grad.to(wide))
    exponent = None
    if dtype == torch.float16 and grad.numel() > 0:
        exponent = _exponent_for_half(grad, head.scale)
        grad = torch.ldexp(grad, exponent)

    def unscaled(total: Tensor) -> Tensor:
        return total if exponent is None else torch.ldexp(total, -exponent)

    by_hidden = hidden.new_zeros(hidden.shape, dtype=wide) if wanted[0] else None
    by_weight = weight.new_empty(weight.shape) if wanted[1] else None
    by_bias = bias.new_empty(bias.shape) if wanted[2] and bias is not None else None
    token_spans, vocabulary_spans = head.spans()
    for columns in vocabulary_spans:
        weight_block = head.operand(weight[columns])
        by_weight_block = weight.new_zeros(weight_block.shape, dtype=wide)
        by_bias_block = weight.new_zeros(weight_block.shape[0], dtype=wide)
        for rows in token_spans:
            hidden_block = head.operand(hidden[rows])
            tile = head.product(hidden_block, weight_block, columns)
            by_tile = head.gradient(tile, rows, columns, normaliser, grad, dtype)
            if by_hidden is not None:
                _add_product(by_hidden[rows], by_tile, weight_block)
            if by_weight is not None:
                _add_product(by_weight_block, by_tile.T, hidden_block)
            if by_bias is not None:
                by_bias_block += by_tile.sum(0, dtype=wide)
        if by_weight is not None:
            by_weight[columns] = unscaled(by_weight_block)
        if by_bias is not None:
            by_bias[columns] = unscaled(by_bias_block)
    if by_hidden is not None:
        by_hidden = unscaled(by_hidden).to(hidden.dtype)
    return by_hidden, by_weight, by_bias


def _tangent(head: Head, normaliser: Tensor, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """Return the change of `logprob` along tangents of hidden, weight and bias."""
    hidden_tangent, weight_tangent, bias_tangent = tangents
    wide = normaliser.dtype
    ones = head.masked(normaliser.new_ones(normaliser.shape[1]))
    out = torch.zeros_like(ones)
    token_spans, vocabulary_spans = head.spans()
    for rows in token_spans:
        hidden = head.operand(head.hidden[rows])
        for columns in vocabulary_spans:
            weight = head.operand(head.weight[columns])
            tile = head.product(hidden, weight, columns)
            by_tile = head.gradient(tile, rows, columns, normaliser, ones, wide)
            change = torch.zeros_like(tile)
            if hidden_tangent is not None:
                _add_product(change, head.operand(hidden_tangent[rows]), weight.T)
            if weight_tangent is not None:
                _add_product(change, hidden, head.operand(weight_tangent[columns]).T)
            if bias_tangent is not None:
                change += bias_tangent[columns]
            out[rows] += torch.linalg.vecdot(by_tile, change)
    return out


class TokenLogprob(Function):
    """Log-probabilities and their normaliser, with first derivatives in both modes."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        return _logprob(Head(hidden, weight, bias, labels, scale, softcap))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, labels, ctx.scale, ctx.softcap = inputs
        ctx.forced = backend.reference_is_forced()  # unknown to autograd's threads for GPUs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(hidden, weight, bias, labels, output[1])
        ctx.save_for_forward(hidden, weight, bias, labels, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[:3])
        with backend.force_reference() if ctx.forced else nullcontext():
            by = _Derivative.apply(*ctx.saved_tensors, ctx.scale, ctx.softcap, grad, wanted)
        return (*by, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        return _Tangent.apply(*ctx.saved_tensors, ctx.scale, ctx.softcap, *tangents[:3]), None


class _Once(Function):
    """A derivative: it has none itself, and says so where autograd would lose it in silence."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise InputError("token_logprob: it has first derivatives only and this asks for a second")

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise InputError("token_logprob: it has first derivatives only and this asks for a second")


class _Derivative(_Once):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        normaliser: Tensor,
        scale: float,
        softcap: float,
        grad: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        head = Head(hidden, weight, bias, labels, scale, softcap)
        return _derivative(head, normaliser, grad, wanted)


class _Tangent(_Once):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        normaliser: Tensor,
        scale: float,
        softcap: float,
        *tangents: Tensor | None,
    ) -> Tensor:
        return _tangent(Head(hidden, weight, bias, labels, scale, softcap), normaliser, tangents)

"""The rules of forward mode for what a model ends in: the log-probability of each label.

Where nobody asks for logits, their tangents `x' W^T + x W'^T + b'` need not be formed. With `G_t`
the gradient of token `t`'s log-probability by its logits, found in reverse mode through all that
follows the output layer, the tangent of the log-probability is

    y'_t = <G_t W, x'_t> + <G_t, W' x_t + b'>

so that `x'` costs one product for all directions together, and nothing is kept as large as the
logits of each direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geffect_fast.capture.factors import widened
from geffect_fast.capture.wrappers import puts_prompt
from geffect_fast.engines.dual_rule import Primals, Rule, Tangents, cast, rows_at_a_time

LOCAL = 1e-5
"""How far a gradient may be from local, relative to its largest number: nothing but rounding."""


class LabelNLL(Rule):
    """`y = -log softmax(z)_label`, so `y' = sum_v p_v z'_v - z'_label`, a block of rows at a time.

    Shapes: z `(n, vocab)`, labels `(n,)` int64, `y` 0 where they are `ignored`.
    """

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=self.ignored, reduction="none")

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        logits, labels, nll = primals
        moved = tangents[0]
        assert moved is not None
        ignored = labels == self.ignored
        labels = labels.masked_fill(ignored, 0)
        out = moved.new_empty(moved.shape[:2])
        step = rows_at_a_time(logits.shape[1])
        for at in range(0, len(logits), step):
            own = slice(at, at + step)
            label = labels[own, None]
            # log-sum-exp is the label's logit plus its NLL
            p = (logits[own] - logits[own].gather(1, label) - nll[own, None]).exp_()
            for m, z in enumerate(moved[:, own]):
                out[m, own] = torch.linalg.vecdot(p, z) - z.gather(1, label)[:, 0]
        return out.masked_fill_(ignored, 0)


class Factors(Rule):
    """What the logits' tangents are made of, kept in place of them: of one call of a layer.

    Attributes:
        logits: `(..., vocab)`, a leaf that reverse mode starts from.
        primals: input, weight and bias.
        tangents: of these.
    """

    logits: Tensor
    primals: Primals = ()
    tangents: Tangents = (None, None, None)

    def value(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.primals = (x, weight, bias)
        self.logits = F.linear(x, weight, bias).detach().requires_grad_()
        return x.new_empty(0)  # in place of the logits, so that these have no tangent

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        self.tangents = tangents
        return primals[0].new_empty(len(next(t for t in tangents if t is not None)), 0)

    def change(self, grad: Tensor, rows: Tensor | slice, n_directions: int) -> Tensor:
        """`y'` of some tokens, `(M, n)`.

        Args:
            grad: by the logits, in their shape.
            rows: which of the logits' rows are those tokens'.
            n_directions: M.
        """
        x, weight, _ = self.primals
        dx, dw, db = self.tangents
        grad = grad.flatten(0, -2)[rows]
        n = len(grad)
        out = widened(grad.new_zeros(n_directions, n))
        if dx is not None:
            by_input = widened(grad @ weight)
            out += torch.linalg.vecdot(by_input, widened(dx.flatten(1, -2)[:, rows]))
        if dw is not None:
            x = x.flatten(0, -2)[rows]
            step = rows_at_a_time(len(weight))
            for at in range(0, n, step):
                own = slice(at, at + step)
                by_logits = widened(grad[own])
                for m, v in enumerate(dw):
                    out[m, own] += torch.linalg.vecdot(by_logits, widened(x[own] @ v.mT))
        if db is not None:
            out += widened(db) @ widened(grad).mT
        return out


class OutputLayer:
    """The linear layer that a model's logits come from, run without their tangents.

    It serves as long as trying shows it to: that it is called once, and that every token's
    log-probability depends on the logits of that token alone.
    """

    def __init__(self, model: nn.Module) -> None:
        found = getattr(model, "get_output_embeddings", lambda: None)()
        self.layer: nn.Linear | None = None
        if isinstance(found, nn.Linear) and type(found).forward is nn.Linear.forward:
            # A hook could look for what logits that are a leaf do not have.
            own = "forward" not in vars(found) and not _hooked(found)
            self.layer = found if own and not puts_prompt(model) else None
        self._tried = False

    @contextmanager
    def calls(self) -> Iterator[list[Factors]]:
        """Inside, the layer's calls are kept as factors, and its logits are leaves."""
        layer, found = self.layer, list[Factors]()
        assert layer is not None

        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return nn.Linear.forward(layer, x)
            factors = Factors()
            factors(*cast(x, layer.weight, layer.bias))
            found.append(factors)
            return factors.logits

        try:
            layer.forward = forward  # type: ignore[method-assign, assignment]
            yield found
        finally:
            vars(layer).pop("forward", None)

    def change(
        self, calls: list[Factors], logprob: Tensor, index: Tensor, kept: bool, n_directions: int
    ) -> Tensor | None:
        """Tangents of the log-probabilities by way of the logits, `(M, total_tokens)`.

        Args:
            calls: that were kept.
            logprob: `(total_tokens,)` as computed from the calls' logits.
            index: tokens that have one `(n,)`.
            kept: whether there are logits at these tokens only.
            n_directions: M.

        Returns:
            None where the layer turns out not to serve.
        """
        if len(calls) != 1 or not logprob.requires_grad:
            return None
        logits = calls[0].logits
        rows = slice(None) if kept else index
        if logits[..., 0].numel() != len(index if kept else logprob):
            return None
        (grad,) = torch.autograd.grad(logprob.sum(), logits, retain_graph=not self._tried)
        if not self._tried:
            # Powers of two, so that there is no rounding.
            weights = 2.0 ** (torch.arange(len(logprob), device=index.device) % 3)
            (weighted,) = torch.autograd.grad(logprob, logits, weights.to(logprob))
            expected = torch.zeros_like(grad).flatten(0, -2)
            expected[rows] = grad.flatten(0, -2)[rows] * weights[index, None].to(grad)
            off = (weighted.flatten(0, -2) - expected).abs()
            if (off > LOCAL * expected.abs().max()).any():
                return None
            self._tried = True
        out = widened(logprob.new_zeros(n_directions, len(logprob)))
        return out.index_copy(1, index, calls[0].change(grad, rows, n_directions).to(out))


def _hooked(module: nn.Module) -> bool:
    """Whether anything is called when the module is, of its own or of all modules."""
    everywhere = torch.nn.modules.module
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            everywhere._global_forward_hooks,
            everywhere._global_forward_pre_hooks,
        )
    )

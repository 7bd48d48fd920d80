"""Small models with weights that matter, samples for them, and fp64 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._decomp.decompositions_for_jvp  # scripts functions before fp64_throughout patches
from architectures import ARCHITECTURES, VOCAB
from torch import nn

FIVE = ("llama", "llama_tied", "gpt2", "phi", "gemma2")
"""Architectures that differ most, for tests that would take too long on all of them."""


def build(
    architecture: str | Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A model in eval mode with weights large enough that every parameter matters."""
    torch.manual_seed(seed)
    made = ARCHITECTURES[architecture]() if isinstance(architecture, str) else architecture()
    model = made.eval()
    config = getattr(model, "config", None)
    if dtype == torch.float64 and getattr(config, "_experts_implementation", "eager") != "eager":
        model.set_experts_implementation("eager")  # torch's grouped product knows no fp64
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


@contextlib.contextmanager
def fp64_throughout() -> Iterator[None]:
    """Have fp64 models that compute norms and softmax in fp32 compute them in fp64.

    The tests are of the method's exactness, not of the rounding that a model puts in between.
    """
    patch = pytest.MonkeyPatch()
    to_float = torch.Tensor.float

    def widened(plain):
        def wide(self, *args, **kwargs):
            if self.dtype == torch.float64:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            return plain(self, *args, **kwargs)

        return wide

    def wide_float(self):
        if self.dtype == torch.float64 or not self.is_floating_point():
            return self.double()  # positions too, which are multiplied by frequencies in fp64
        return to_float(self)

    with patch.context() as context:
        for converts in ("to", "type", "softmax"):
            context.setattr(torch.Tensor, converts, widened(getattr(torch.Tensor, converts)))
        context.setattr(torch.Tensor, "float", wide_float)
        yield


def samples(lengths: list[int], seed: int = 0, prompt: int = 1) -> list[dict[str, list[int]]]:
    """Tokenised samples of these lengths, labels on all but the first `prompt` tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        hidden = min(prompt, length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return rows


def collated(rows):
    """A batch of samples of one length, for transformers' Trainer."""
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def with_dropout(model, p):
    """The model, whose dropout modules drop activations in training with probability `p`."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


def shaken(model, dtype=None):
    """Move adapters away from the identity, where half of their gradients are zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model.eval() if dtype is None else model.eval().to(dtype)

"""Whether the reference model, which NPO-like objectives compare with, is the model itself."""

from __future__ import annotations

import torch
from torch import nn

REFERENCE_IS_MODEL = (
    "the model itself, with which every log-ratio is 0: npo, dpo, tnpo, wtnpo are the same at any "
    "beta but for their scale, and the gradient of kl is 0; give the model as it was before "
    "unlearning (--reference) where that is another"
)
"""What it means, for people."""


def same_weights(model: nn.Module, reference: nn.Module) -> bool:
    """Whether two models have the same parameters, name by name and bit by bit."""
    own, other = dict(model.named_parameters()), dict(reference.named_parameters())
    return own.keys() == other.keys() and all(
        p.shape == other[name].shape
        and p.dtype == other[name].dtype
        and torch.equal(p, other[name].to(p.device))
        for name, p in own.items()
    )

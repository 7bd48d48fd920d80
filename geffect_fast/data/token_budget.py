"""The token budget of a batch, from the bytes that a model takes for a token and the free memory.

The bytes are counted from the model's modules and, for norms and activations, found by trying each
kind on a few rows; no forward pass of the model is run. `tests/measure/test_token_budget.py`
compares the estimate with the memory that profiles take.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from geffect_fast.data.memory import free_memory
from geffect_fast.errors import InputError
from geffect_fast.trying import Trying

MEMORY_SHARE = 0.8
"""Part of the free memory that a batch may take. The rest is left for errors of the estimate and
for fragmentation; a batch for which memory runs out all the same costs twice its time."""

MIN_CPU_CAP = 256
CPU_CAP_PER_HIDDEN = 1
"""Most tokens of a batch on a CPU, for each of the `d` hidden features; at least `MIN_CPU_CAP`.

Under a mask, a token of a packed batch attends to every token of the batch. This takes `4 d`
operations for each pair and layer, and the linear layers take some `24 d^2` for each token. In a
batch of `d` tokens attention therefore takes a sixth of the time of the linear layers. Larger
batches gain nothing else on a CPU. Below 256 tokens the overhead of each call would dominate.
"""

WIDE_BYTES = 4
"""Bytes of an element of a direction, a projection or a log-probability, in fp32."""

LOGIT_COPIES = 3
"""Copies in fp32 of a predicted token's logits where the backward begins: the log-softmax, and the
gradients before and behind it. The logits themselves are freed by then."""

MORE_LOGIT_COPIES = 5
"""Further copies for objectives of whole distributions: the logits, both models'
log-probabilities, their product and its gradient."""

_ROWS = 4
"""Rows that modules are tried on."""


def estimate_token_budget(
    model: nn.Module,
    *,
    n_directions: int,
    n_gradients: int = 0,
    shared: bool = False,
    forward: bool = False,
    logits: bool = False,
    predicted: float = 1.0,
    by_sample: bool = False,
    n_trained: int | None = None,
    memory_bytes: int | None = None,
) -> int:
    """The largest batch, in tokens, that the memory of the model's device holds.

    The largest `T` with `fixed + b T + q T^2 <= 0.8 free`, where

        fixed = 4 M P                directions, in fp32 (once more in 16 bits on a GPU)
              + 4 K P + e P          whole gradients of objectives, and those of one backward
              + e head               if K is 0: the gradient of the head, formed before all others
        b = e sum(d_in + d_out)      inputs of trainable linear layers, outputs of all
          + norms, activations       what each keeps for its backward (an activation its output
                                     too), found by trying it
          + 12 r vocab               logits, log-softmax and their gradients, at predicted labels
          + 4 M sum(d_out)           with `shared`: projections A V^T, kept for all objectives
        q = 1 + e layers             a mask, and each layer's own copy of it as a bias; 0 with
                                     `by_sample`; with eager attention the scores of all heads,
                                     saved in every layer

    `e` is the bytes of a weight, `P` is `n_trained`, `M` is `n_directions`, `K` is `n_gradients`,
    `r` is `predicted`. Gradient checkpointing saves no memory here, since it is off while a model
    is watched. With `forward`, `1 + M` times the logits' part replaces `b` where it is more. On a
    CPU `T` is at most `max(256, hidden)`, see `CPU_CAP_PER_HIDDEN`.

    Args:
        model: a transformers causal language model, on its device, before directions are made.
        n_directions: number of risks whose gradients are kept.
        n_gradients: number of objectives whose whole gradients are formed as well.
        shared: whether several objectives share a forward.
        forward: whether the forward engine runs.
        logits: whether any objective reads logits.
        predicted: part of the tokens that predict a label.
        by_sample: whether attention runs sample by sample, without a mask.
        n_trained: number of trainable elements whose gradients this rank holds; None: all of the
            model's.
        memory_bytes: bytes to use instead of the device's free memory.

    Returns:
        The most tokens of a batch, at least 1.

    Raises:
        InputError: an argument is out of range, or the model has no weight matrix.
    """
    if n_directions < 0:
        raise InputError(f"n_directions: {n_directions} is negative; give the number of risks")
    if memory_bytes is not None and memory_bytes < 1:
        raise InputError(f"memory_bytes: {memory_bytes} is no memory; give at least 1, or None")
    weights = [(m, w) for m in model.modules() if (w := _weight_matrix(m)) is not None]
    if not weights:
        raise InputError("model: it has no weight matrix, so it is no language model")
    device, itemsize = weights[0][1].device, weights[0][1].element_size()
    wide = max(WIDE_BYTES, itemsize)
    embeddings = [w for m, w in weights if isinstance(m, nn.Embedding)]
    vocab, hidden = max((w.shape for w in embeddings), default=weights[0][1].shape)
    layers = [w for m, w in weights if not isinstance(m, nn.Embedding) and vocab not in w.shape]
    heads = [w for m, w in weights if not isinstance(m, nn.Embedding) and vocab in w.shape]
    # A Conv1D stores its weight transposed, so the larger side counts as d_out.
    d_out = sum(max(w.shape) for w in layers)
    if n_trained is None:
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    fixed = wide * n_directions * n_trained
    if itemsize < WIDE_BYTES and device.type == "cuda":
        fixed += itemsize * n_directions * n_trained
    if n_gradients:
        fixed += (wide * n_gradients + itemsize) * n_trained
    else:
        fixed += itemsize * max((w.numel() for w in heads if w.requires_grad), default=0)

    sides = sum(sum(w.shape) if w.requires_grad else max(w.shape) for w in layers)
    picked = getattr(getattr(model, "config", None), "num_experts_per_tok", 1) or 1
    stacked = (p for p in model.parameters() if p.dim() == 3)  # weights of experts
    sides += picked * sum(sum(p.shape[1:]) for p in stacked)
    copies = LOGIT_COPIES + (MORE_LOGIT_COPIES if logits else 0)
    per_token = itemsize * sides + _kept_beside(model) + wide * copies * predicted * vocab
    if shared:
        per_token += wide * n_directions * (d_out + predicted * vocab)
    if forward:
        per_token = max(per_token, wide * copies * (1 + n_directions) * predicted * vocab)
    per_token = int(per_token)

    per_pair = 0 if by_sample else _bytes_a_pair(model, itemsize, wide)
    free = free_memory(device) if memory_bytes is None else memory_bytes
    usable = max(int(MEMORY_SHARE * free) - fixed, 0)
    if per_pair:
        tokens = (isqrt(per_token**2 + 4 * per_pair * usable) - per_token) // (2 * per_pair)
    else:
        tokens = usable // per_token
    if device.type == "cpu":
        tokens = min(tokens, max(MIN_CPU_CAP, CPU_CAP_PER_HIDDEN * hidden))
    return max(tokens, 1)


def _weight_matrix(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.ndim == 2 else None


def _bytes_a_pair(model: nn.Module, itemsize: int, wide: int) -> int:
    """Bytes that attention keeps for every pair of tokens of a batch."""
    config: Any = getattr(model, "config", None)
    n_layers = getattr(config, "num_hidden_layers", 1)
    if getattr(config, "_attn_implementation", "eager") != "eager":
        return 1 + itemsize * n_layers
    # The softmax in fp32 is kept, and in a 16-bit model its rounded copy too.
    kept = wide + (itemsize if itemsize < wide else 0)
    return itemsize + getattr(config, "num_attention_heads", 1) * (n_layers * kept + 2 * wide)


def _kept_beside(model: nn.Module) -> int:
    """Bytes for each token that norms and activations keep for a backward."""
    tried: dict[tuple[type[nn.Module], int, torch.dtype], int] = {}
    total = 0
    for parent in model.modules():
        widths = [max(w.shape) for m in parent.children() if (w := _weight_matrix(m)) is not None]
        some = next((p for p in parent.parameters() if p.is_floating_point()), None)
        for module in parent.children():
            if any(True for _ in module.children()) or _weight_matrix(module) is not None:
                continue
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 1 and weight.is_floating_point():
                like, width = weight, weight.numel()
            elif weight is None and widths and some is not None:
                like, width = some, max(widths)  # an activation, as wide as its widest neighbour
            else:
                continue
            kind = type(module), width, like.dtype
            if kind not in tried:
                tried[kind] = _tried_on_rows(module, like, width)
            total += tried[kind]
    return total


def _tried_on_rows(module: nn.Module, like: Tensor, width: int) -> int:
    """Bytes for each row that a norm or an activation keeps for its backward.

    An activation counts with its output and without its input.
    """
    x = torch.zeros(_ROWS, width, dtype=like.dtype, device=like.device, requires_grad=True)
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return saved

    y = None
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda s: s)
    with Trying(), torch.enable_grad(), hooks:
        y = module.forward(x)
    if not isinstance(y, Tensor):  # such as a rotary embedding or a gated norm
        return 0
    if not own:
        kept[y.untyped_storage()._cdata] = y.untyped_storage().nbytes()
        kept.pop(x.untyped_storage()._cdata, None)
    return sum(kept.values()) // _ROWS

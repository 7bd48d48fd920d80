"""One forward pass over a batch: log-probabilities of the labels, and other needs of objectives."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geffect_fast.capture.compat import eagerly, frequencies_at_first, puts_prompt, with_signature
from geffect_fast.capture.segments import Segments
from geffect_fast.data.batch import Batch
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.objectives import Outputs
from geffect_fast.objectives.base import Need
from geffect_fast.precision import widened


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward, or that of the model inside its wrapper, names `argument`."""
    return argument in inspect.signature(with_signature(model).forward).parameters


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that keeps a model from building a cache, where the model takes it.

    With a cache, transformers does not tell packed sequences apart. Some models (GraniteMoe) do not
    name the argument but hand it on to the model inside.
    """
    inside = with_signature(model)
    parameters = inspect.signature(inside.forward).parameters
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    config = getattr(inside, "config", None)
    named = "use_cache" in parameters or (hands_on and hasattr(config, "use_cache"))
    return {"use_cache": False} if named else {}


def positions(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The argument that tells packed sequences apart, where the model takes it.

    The argument is left out where every sequence has a row of its own. The model then counts
    positions in its own way (RoBERTa's kin from `padding_idx + 1`, and past padding).
    """
    given = batch.position_ids is not None and takes(model, "position_ids")
    return {"position_ids": batch.position_ids} if given else {}  # type: ignore[dict-item]


def keeps_logits(model: nn.Module, batch: Batch) -> bool:
    """Whether the model computes logits at the batch's targets only."""
    return batch.packed and takes(model, "logits_to_keep")


def sample_axis(model: nn.Module, batch: Batch, per_token: bool = False) -> Segments:
    """The segments of a module's rows by sample, or by token, in a forward over `batch`."""
    host = batch.to("cpu")
    kept = host.target_index if keeps_logits(model, batch) else None
    if per_token and puts_prompt(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the tokens of a soft prompt have no position in a sample; "
            "resolve without 'position'"
        )
    if per_token:
        return Segments.tokens(batch.input_ids.shape, kept)
    if not batch.packed:
        per_sample = len(batch.roles) // batch.n_samples
        return Segments.rectangular(batch.input_ids.shape, per_sample)
    return Segments.packed(host.cu_samples, kept)


def model_outputs(model: nn.Module, batch: Batch, needs: Collection[Need] = ()) -> Outputs:
    """Run `model` on `batch`, under the caller's grad mode.

    Args:
        model: a causal language model of transformers, or one that is called and answers like it;
            `geffect_fast.capture.compat` knows the wrappers that it may be in.
        batch: the batch, on the model's device.
        needs: `hidden_states` and `logits` cost memory and are returned only where asked for;
            `reference_hidden_states` and `reference_logits` ask for the same, here of this model.

    Raises:
        UnsupportedModelError: the model's answer has no logits of the expected shape, or the batch
            packs several sequences and the model cannot be told where they start.
    """
    wants_logits = not {"logits", "reference_logits"}.isdisjoint(needs)
    wants_hidden = not {"hidden_states", "reference_hidden_states"}.isdisjoint(needs)
    index = batch.target_index
    kwargs: dict[str, Any] = {"input_ids": batch.input_ids, **without_cache(model)}
    kwargs |= positions(model, batch)
    if keeps_logits(model, batch):
        kwargs["logits_to_keep"] = index
    if wants_hidden:
        kwargs["output_hidden_states"] = True
    if batch.packed and len(batch.roles) > 1 and "position_ids" not in kwargs:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no position_ids, so sequences cannot be packed into one "
            "row; give a model (or reference_model) that takes them, or no reference_model"
        )
    with eagerly(model), sequences_known(batch), frequencies_at_first(model):
        answer = model(**kwargs)
    kept = len(index) if keeps_logits(model, batch) else None
    logits = logits_of(answer, model, batch.input_ids, kept).flatten(0, 1)
    if kept is None:
        logits = logits[index]
    # Log-probabilities are differences of numbers of like size: never in bf16 or fp16.
    nll = F.cross_entropy(widened(logits), batch.targets[index], reduction="none")
    token_logprob = nll.new_zeros(batch.total_tokens).index_copy(0, index, -nll)
    hidden = None
    if wants_hidden:
        length = batch.input_ids.shape[1]  # states of a soft prompt lie before these
        hidden = tuple(h[:, -length:].flatten(0, 1) for h in answer.hidden_states)
    return Outputs(token_logprob, logits if wants_logits else None, hidden)


def nll_by_sample(outputs: Outputs, batch: Batch) -> Tensor:
    """The samples' sums of negative log-likelihoods, `(n_samples,)`, differentiable."""
    nll = -outputs.token_logprob
    return batch.sample_sum(nll, torch.ones_like(nll, dtype=torch.bool))


def logits_of(answer: Any, model: nn.Module, input_ids: Tensor, kept: int | None = None) -> Tensor:
    """The logits at the tokens of the input, `(batch, tokens, vocabulary)`.

    Logits of virtual tokens, which a soft prompt puts before the input, are cut off.

    Args:
        answer: what the model returned.
        model: the model.
        input_ids: `(batch, length)`.
        kept: number of positions the model was asked for; None: all.

    Raises:
        UnsupportedModelError: there are no logits, or their shape is that of other tokens.
    """
    logits = getattr(answer, "logits", answer)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModelError(
            f"{type(model).__name__} returned no logits of shape (batch, tokens, vocabulary); "
            "give a causal language model"
        )
    length = input_ids.shape[1] if kept is None else kept
    if puts_prompt(model):
        logits = logits[:, -length:]
    if logits.shape[:2] != (len(input_ids), length):
        raise UnsupportedModelError(
            f"{type(model).__name__} returned logits of shape {tuple(logits.shape)} for "
            f"{len(input_ids)} sequences of {length} tokens; give a model with one row a token"
        )
    return logits


# ---- facts that transformers would otherwise read off the device ----

_BATCH: ContextVar[Batch | None] = ContextVar("_BATCH", default=None)


@contextmanager
def sequences_known(batch: Batch) -> Iterator[None]:
    """Inside, transformers' models run over `batch` without reading its positions and tokens.

    Otherwise the models find out from `position_ids` whether a row holds several sequences, and
    from `input_ids` whether there is padding to warn of. Each of these waits for the device, once a
    forward, although the batch holds both answers.

    Args:
        batch: the batch, on the model's device, whose `position_ids` the model is given.
    """
    _register_batch()
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def _register_batch() -> None:
    masks: Any = sys.modules.get("transformers.masking_utils")
    models: Any = sys.modules.get("transformers.modeling_utils")
    if models is None:  # no model of transformers has been made
        return
    find = getattr(masks, "find_packed_sequence_indices", None)
    if find is None or hasattr(find, "__wrapped__"):
        return

    @wraps(find)
    def known(position_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        batch = _BATCH.get()
        # A model may count positions of its own, over all sequences.
        if batch is None or position_ids is not batch.position_ids:
            found: Tensor | None = find(position_ids, *args, **kwargs)
            return found
        several = batch.packed and len(batch.roles) > 1
        return batch.token_sequence()[None] if several else None

    masks.find_packed_sequence_indices = known
    kind = models.PreTrainedModel
    warn = getattr(kind, "warn_if_padding_and_no_attention_mask", None)
    if warn is None:
        return

    @wraps(warn)
    def without_padding(self: Any, *args: Any, **kwargs: Any) -> None:
        if _BATCH.get() is None:  # no batch holds padding
            warn(self, *args, **kwargs)

    kind.warn_if_padding_and_no_attention_mask = without_padding


# ---- attention of packed sequences on a CPU ----
#
# Under one mask, a packed batch of `n` sequences costs attention `n` times what its sequences cost
# alone, and on a CPU most of that is not even arithmetic. Here every sequence is handed to
# transformers' own sdpa function, exactly as it is when the model runs on that sequence alone.

PACKED = "geffect_fast_packed"
"""The name under which transformers knows the attention function below."""

_LENGTHS: ContextVar[tuple[int, ...]] = ContextVar("_LENGTHS")

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings that cut attention short. Sequences that are no longer than these are unaffected."""


@contextmanager
def packed_attention(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, models that take their attention from transformers' table attend by sequence.

    Leave the block only after everything that runs the model's modules once more (a vjp, a jvp). A
    model runs as it is where it has attention of its own, where other attention than sdpa is
    chosen, on other devices than a CPU, and where sequences are longer than its window.

    Args:
        model: a model of transformers, whose configs are restored at the end.
        batch: the batch, on the model's device.
    """
    configs = _served(model, batch)
    if not configs:
        yield
        return
    lengths = tuple(batch.sequence_lengths)
    _register_attention()
    token = _LENGTHS.set(lengths)
    try:
        for config in configs:
            config._attn_implementation = PACKED
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
        _LENGTHS.reset(token)


def splits_attention(model: nn.Module, batch: Batch) -> bool:
    """Whether `packed_attention` changes how `model` runs on `batch`."""
    return bool(_served(model, batch))


def _served(model: nn.Module, batch: Batch) -> list[Any]:
    """The configs to change for `batch`; empty where the model runs as it is."""
    if not batch.packed or len(batch.roles) == 1 or batch.input_ids.device.type != "cpu":
        return []
    configs = attention_configs(model)
    if {config._attn_implementation for config in configs} != {"sdpa"}:
        return []
    return configs if max(batch.sequence_lengths) <= reach(configs) else []


def attention_configs(model: nn.Module) -> list[Any]:
    """The configs that say which attention runs; none where a module has attention of its own."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if not getattr(module, "_supports_attention_backend", True):
            return []
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
    return list(configs.values())


def reach(configs: list[Any]) -> float:
    """Tokens of the longest sequence whose attention no window cuts short."""
    windows = [getattr(config, name, None) for config in configs for name in WINDOWS]
    return min((window for window in windows if isinstance(window, int)), default=float("inf"))


def _register_attention() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # transformers builds no mask for a name that the table of masks does not know.
    if PACKED not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(PACKED, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `(1, heads, total_tokens, d)` by transformers' sdpa, sequence by sequence."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lengths = _LENGTHS.get()
    total = sum(lengths)
    if attention_mask is not None or any(x.shape[2] != total for x in (query, key, value)):
        raise UnsupportedModelError(
            f"{type(module).__name__}: its attention does not run over exactly the tokens of the "
            "batch, so packed samples cannot be told apart; give token_budget=1, so that each has "
            "a batch of its own"
        )
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    # Neighbouring sequences of one length take one call.
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *qkv in zip(
        runs, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True
    ):
        q, k, v = (x.unflatten(2, (count, length))[0].transpose(0, 1) for x in qkv)
        outputs.append(sdpa(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None], None

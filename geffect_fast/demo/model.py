"""The demo's model: a small Llama that learns rows by heart, and begins to forget some of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from geffect_fast.data import SampleSet, make_batches
from geffect_fast.data.batch import Batch
from geffect_fast.errors import GEffectError
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.terminal import progress_bar

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PEAK_RATE = 1e-3
KEPT = 0.93
"""Share of the forget set's mean token probability that is left when a profile is taken."""
END = "<|end|>"


@dataclass(frozen=True)
class Size:
    """The size of the demo.

    Attributes:
        n_authors: number of invented authors, with ten questions each.
        vocab_size, hidden, n_layers: sizes of the Llama.
        known: share of answers that must be reproduced word for word before training ends.
        max_epochs: number of epochs after which training gives up.
        n_updates: number of updates of unlearning with each objective.
    """

    n_authors: int = 20
    vocab_size: int = 1024
    hidden: int = 256
    n_layers: int = 4
    known: float = 0.99
    max_epochs: int = 80
    n_updates: int = 12


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on `texts`, which can encode any text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def make_model(tokenizer: PreTrainedTokenizerBase, size: Size) -> LlamaForCausalLM:
    """A Llama of the given size with random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config).eval()
    # With std 0.02, as for all other weights, the norm after the embeddings would enlarge their
    # gradient so much that nearly all of the effect would be in the embeddings.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    return model


def memorise(model: nn.Module, sets: list[SampleSet], size: Size, seed: int, progress: bool) -> int:
    """Train until `size.known` of the answers are reproduced word for word.

    Returns:
        The number of epochs taken.

    Raises:
        GEffectError: `size.max_epochs` epochs were not enough.
    """
    order = random.Random(seed)
    samples = [sample for part in sets for sample in part.samples]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    with progress_bar(progress, "learning by heart", 1.0) as show:
        for epoch in range(1, size.max_epochs + 1):
            order.shuffle(samples)
            seen = []
            batches = make_batches(SampleSet("demo", tuple(samples)), ("answer",), token_budget=512)
            for batch in batches:
                logprob, right = _predict(model, batch)
                (-logprob.mean()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(right.float().mean())
            share = float(torch.stack(seen).mean())
            show(completed=share)
            # The learning rate falls as less is left to learn.
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, max(0.1, 5 * (1 - share)))
            if share >= size.known and all(recall(model, s)[1] >= size.known for s in sets):
                return epoch
    raise GEffectError(f"the demo's model did not learn its data in {size.max_epochs} epochs")


def start_unlearning(model: nn.Module, forget: SampleSet, progress: bool) -> int:
    """Ascend the loss of the forget set until `KEPT` of its tokens' mean probability is left.

    Returns:
        The number of steps taken.

    Raises:
        GEffectError: the probability did not fall far enough in 1000 steps.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    batches = make_batches(forget, ("answer",), token_budget=512)
    target = KEPT * recall(model, forget)[0]
    seen: list[float] = []
    with progress_bar(progress, "first steps of unlearning", 1.0) as show:
        for step in range(1, 1001):
            logprob, _ = _predict(model, batches[step % len(batches)])
            logprob.mean().backward()
            # Clipping keeps the length of a step at most the learning rate.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(logprob.detach().exp().mean()))
            probability = sum(seen[-len(batches) :]) / len(batches)
            if len(seen) < len(batches):
                continue
            show(completed=(1 - probability) / (1 - target))
            if probability <= target:
                return step
    raise GEffectError("the demo's model did not begin to forget in 1000 steps")


@torch.no_grad()
def recall(model: nn.Module, samples: SampleSet) -> tuple[float, float]:
    """The mean token probability of answers, and the share of answers reproduced word for word.

    An answer counts as reproduced where each of its tokens is the likeliest after those before it.
    Greedy decoding then writes the answer.
    """
    probabilities, reproduced = [], []
    for batch in make_batches(samples, ("answer",), token_budget=2048):
        logprob, right = _predict(model, batch)
        probabilities.append(logprob.exp())
        wrong = torch.zeros(batch.total_tokens)
        wrong[batch.target_index] = (~right).float()
        reproduced.append(batch.sample_sum(wrong, batch.target_mask()) == 0)
    return float(torch.cat(probabilities).mean()), float(torch.cat(reproduced).float().mean())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer in a folder that transformers can load.

    Raises:
        OSError: the disk refuses.
    """
    from safetensors import SafetensorError

    with quiet_transformers():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # such as for a full disk
            raise OSError(str(error)) from error


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every target token, and whether it is the likeliest."""
    index = batch.target_index
    outputs = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    logprob = outputs.logits.reshape(batch.total_tokens, -1)[index].float().log_softmax(-1)
    target = batch.targets[index]
    return logprob.gather(1, target[:, None]).squeeze(1), logprob.argmax(-1) == target

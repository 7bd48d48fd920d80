"""Small models of every supported architecture, built from configs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

VOCAB = 61


def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **kwargs,
    )
    return LlamaForCausalLM(config)


def llama_tied():
    return llama(tie_word_embeddings=True, attention_bias=True)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=128,
            sliding_window=16,
        )
    )


def mixtral():
    """A mixture: a router sends every token to two of three experts, stacked in one parameter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=128,
        )
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_tied": llama_tied,
    "gpt2": gpt2,
    "phi": phi,
    "gemma2": gemma2,
}


def build(
    architecture: str | Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """A model in eval mode with weights large enough that every parameter matters."""
    torch.manual_seed(seed)
    made = ARCHITECTURES[architecture]() if isinstance(architecture, str) else architecture()
    model = made.eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


@contextlib.contextmanager
def fp64_throughout() -> Iterator[None]:
    """Models that compute norms and softmax in fp32 do so in fp64: the exactness of the method is
    tested, not the rounding that a model puts in between."""
    patch = pytest.MonkeyPatch()
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, nn.functional.softmax

    def wide_to(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    def wide_float(self):
        return self if self.dtype == torch.float64 else to_float(self)

    def wide_softmax(input, *args, dtype=None, **kwargs):
        dtype = torch.float64 if input.dtype == torch.float64 else dtype
        return softmax(input, *args, dtype=dtype, **kwargs)

    with patch.context() as context:
        context.setattr(torch.Tensor, "to", wide_to)
        context.setattr(torch.Tensor, "float", wide_float)
        context.setattr(nn.functional, "softmax", wide_softmax)
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

"""Memory on the device: the token budget against the measured peak, and memory that runs out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from models import samples
from on_gpu import DEVICE, gpu_only
from torch import nn

from geffect_fast.data import token_budget
from geffect_fast.errors import GEffectWarning
from geffect_fast.measure.profiler import Profiler

transformers = pytest.importorskip("transformers")

GIB = 2**30
FORGET, RETAIN = samples([57] * 160, 1, 28), samples([55] * 160, 2, 27)
PARAMETERS = {"engine": "reverse", "resolve": ("parameter", "sample")}
JOBS = {
    "norms": (["ga"], PARAMETERS),
    "no norms": (["ga"], PARAMETERS | {"norms": False}),
    "four": (["ga", "wga", "npo", "simnpo"], PARAMETERS | {"norms": False}),
    "forward": (["ga", "wga"], {"engine": "forward", "resolve": ("sample",), "norms": False}),
}


def make(dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=16_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().to(DEVICE, dtype)


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("job", JOBS)
def test_a_profile_takes_most_of_the_memory_and_not_all(
    job: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives, settings = JOBS[job]
    free = 2 * GIB
    model = make(dtype)
    monkeypatch.setattr(token_budget, "free_memory", lambda _: free)
    profiler = Profiler.of(
        model, None, forget=FORGET, retain=RETAIN, objectives=objectives, **settings
    )
    n_tokens = sum(len(row["input_ids"]) for row in FORGET)
    assert 1000 < profiler.token_budget < n_tokens, "batches should be full, and several"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    profiler.measure()
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.6 * free <= peak <= 0.95 * free, peak / free


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit the process's memory on the device to its present share and 1.5 GiB."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved(DEVICE)
    torch.cuda.set_per_process_memory_fraction((held + 1.5 * GIB) / total, DEVICE)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    torch.cuda.empty_cache()


@gpu_only
@pytest.mark.parametrize("job", ["norms", "four"])
def test_batches_that_do_not_fit_are_redone_in_smaller_ones(
    job: str, request: pytest.FixtureRequest
) -> None:
    objectives, settings = JOBS[job]
    model = make(torch.float32)

    def measured() -> tuple[np.ndarray, int]:
        profiler = Profiler.of(
            model, None, forget=FORGET, retain=RETAIN, objectives=objectives, token_budget=10**6,
            **settings,
        )  # fmt: skip
        result = profiler.measure().dataset
        return result.g_effect.values, result.attrs["token_budget"]

    expected, budget = measured()
    assert budget == 10**6
    request.getfixturevalue("little_memory")
    with pytest.warns(GEffectWarning, match="going on with a token budget of"):
        found, budget = measured()
    assert budget < 10**4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

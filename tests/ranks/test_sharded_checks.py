"""`check` of models that FSDP2 shares out, by all ranks together: what one process finds."""

import dataclasses

import numpy as np
import pytest
import torch
from models import build, samples
from ranked import on_ranks
from torch.distributed.fsdp import fully_shard

from geffect_fast import ranks
from geffect_fast.capture import layer_rules as rules
from geffect_fast.capture.shards import shard
from geffect_fast.measure import check as module
from geffect_fast.measure import plain_autograd
from geffect_fast.measure.check import check

ROWS = samples([7, 12, 20, 5], prompt=3)
PAIRS = [
    row | {"alternative": other}
    for row, other in zip(ROWS, samples([9, 4, 6, 11], 5, prompt=2), strict=True)
]
CASES = {
    "tied": ("llama_tied", torch.float64, {}),
    "gpt2": ("gpt2", torch.float32, {"token_budget": 20}),
    "experts": ("qwen2_moe", torch.float64, {"samples": 2}),
    "pairs": (
        *("llama", torch.float64),
        {"data": PAIRS, "objectives": "dpo(beta=0.2),npo+0.5*kl,rmu(layer=1),gd", "samples": 3},
    ),
    "half": ("llama", torch.bfloat16, {"samples": 2}),
}


def found_of(architecture, dtype, more, sharded):
    model, reference = build(architecture, dtype), build(architecture, dtype, seed=1)
    for each in (model, reference) if sharded else ():
        shard(each, ranks.here(), torch.device("cpu"))
    return check(model, None, **({"data": ROWS, "reference_model": reference} | more))


def every_case(sharded):
    with pytest.MonkeyPatch.context() as patch:
        found = {name: found_of(*case, sharded) for name, case in CASES.items()}
        patch.setattr(plain_autograd, "PART_HELD", 0.0)  # two gradients at a time
        found["two"] = found_of("llama", torch.float64, {"samples": 3}, sharded)
        patch.setattr(rules.NormCall, "sums", twice)
        found["wrong"] = found_of("llama", torch.float32, {"samples": 2}, sharded)
    return found


_sums = rules.NormCall.sums


def twice(self, g, rows):
    return 2 * _sums(self, g, rows)


@pytest.fixture(scope="module")
def alone():
    return every_case(False)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_check_parts_as_one_process_the_whole(alone, size):
    for found in on_ranks(size, every_case, True):
        for name, one in alone.items():
            mine = found[name]
            assert mine.exact == (name != "wrong") == one.exact, name
            print(name, mine.kinds[0].relative, one.kinds[0].relative, mine.wider)
            for field in ("coverage", "uncovered", "unreached", "layout", "n_tokens", "wider"):
                assert getattr(mine, field) == getattr(one, field), (name, field)
            for a, b in zip(mine.kinds, one.kinds, strict=True):
                assert (a.kind, a.rules) == (b.kind, b.rules), name

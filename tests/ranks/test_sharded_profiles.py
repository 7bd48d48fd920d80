"""Models whose parameters FSDP2 shares out give the numbers of one process."""

import pytest
import torch
from models import build
from ranked import on_ranks
from test_profile_on_ranks import TOLERANCE, assert_same, profiled

from geffect_fast import ranks
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import shard

CASES = {
    "fp32": ("llama", torch.float32, {}),
    "tied": ("llama_tied", torch.float64, {}),
    "gpt2": ("gpt2", torch.float64, {}),
    "experts": ("qwen2_moe", torch.float64, {}),
    "position": ("llama", torch.float64, {"resolve": ("sample", "position")}),
    "sums": ("llama_tied", torch.float64, {"resolve": ("parameter",)}),
    "bare": ("llama", torch.float64, {"norms": False, "resolve": ("group", "sample")}),
    "few": ("llama", torch.float64, {"lengths": {"forget": [5], "retain": [8, 3, 9]}}),
}


def every_case(sharded):
    found = {}
    for name, (architecture, dtype, given) in CASES.items():
        models = {}
        if sharded:
            models = {"model": build(architecture, dtype)}
            models["reference_model"] = build(architecture, dtype, seed=7)
            for model in models.values():
                shard(model, ranks.here(), torch.device("cpu"))
                assert is_sharded(model)
        found[name] = profiled(architecture, dtype, engine="reverse", **models, **given)
    return found


@pytest.fixture(scope="module")
def alone():
    return every_case(False)


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_models_give_what_one_process_finds(alone, size):
    for found in on_ranks(size, every_case, True):
        for name, one in alone.items():
            assert_same(one, found[name], TOLERANCE[CASES[name][1]])

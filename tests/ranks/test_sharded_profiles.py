"""Models whose parameters FSDP2 shares out give the numbers of one process."""

import pytest
import torch
from models import build
from ranked import on_ranks
from test_profile_on_ranks import TOLERANCE, assert_same, profiled

from geffect_fast import ranks
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import shard
from geffect_fast.errors import GEffectError, InputError

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


def one_fails(how):
    from geffect_fast.engines import reverse

    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    if how == "alike" or torch.distributed.get_rank() == 1:

        def fails(*_):
            raise InputError("no luck: try again")

        reverse.model_outputs = fails
    with pytest.raises(InputError) as first:
        profiled("llama", torch.float32, model=model, reference_model=None, objectives=["ga"])
    with pytest.raises(GEffectError) as second:
        profiled("llama", torch.float32, model=model, reference_model=None, objectives=["ga"])
    return str(first.value), str(second.value)


def test_an_error_of_one_rank_between_exchanges_ends_all():
    one, other = on_ranks(2, one_fails, "one", fails=True)
    assert one[0] == "rank 1: no luck: try again"
    assert other[0] == "no luck: try again"
    assert {found[1].partition(":")[0] for found in (one, other)} == {"process group"}


def test_an_error_of_all_ranks_leaves_the_group():
    for said in on_ranks(2, one_fails, "alike", fails=True):
        assert {line.removeprefix("rank 0: ").removeprefix("rank 1: ") for line in said} == {
            "no luck: try again"
        }

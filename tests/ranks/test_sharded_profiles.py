"""Models whose parameters FSDP2 shares out give the numbers of one process."""

import pytest
import torch
from architectures import ARCHITECTURES
from models import build
from ranked import on_ranks
from test_profile_on_ranks import TOLERANCE, assert_same, profiled
from torch import nn
from torch.distributed.fsdp import fully_shard

from geffect_fast import ranks
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import gathered, shard
from geffect_fast.errors import GEffectError, InputError


def lora():
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(ARCHITECTURES["llama"](), adapter)


CASES = {
    "adapter": (lora, torch.float64, {}),
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


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_models_give_what_one_process_finds(alone, size):
    for found in on_ranks(size, every_case, True):
        for name, one in alone.items():
            assert_same(one, found[name], TOLERANCE[CASES[name][1]])


class Branches(nn.Module):
    """A module of which a rank may use one half alone, as tokens do an expert."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 5), nn.Linear(3, 5)

    def forward(self, x, both):
        return self.always(x) + (self.sometimes(x) if both else 0)


def gradients_of_branches():
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(2, 4, 3)
    whole = sum(model(x[rank], both=rank == 0).square().sum() for rank in range(2))
    expected = torch.autograd.grad(whole, list(model.parameters()))
    fully_shard(model, mesh=ranks.here().mesh(torch.device("cpu")))
    plan, rank = Plan.of(model, may_be_sharded=True), torch.distributed.get_rank()
    model.always.bias.grad = torch.ones_like(model.always.bias)
    with plan.summing():
        loss = model(x[rank], both=rank == 0).square().sum()
        own = plan.sharded_gradients(loss, list(plan.parameters.values()), more=False)
    found = [
        gathered(part[None], plan.shards.own(p))[0]
        for part, p in zip(own, plan.parameters.values(), strict=True)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (model.always.bias.grad.full_tensor() == 1).all()  # as the program had left it
    return True


def test_what_one_rank_does_not_use_is_added_up_as_zero():
    assert on_ranks(2, gradients_of_branches) == [True, True]


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

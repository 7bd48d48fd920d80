"""The forward engine on models that FSDP2 shares out gives the numbers of one process."""

from contextlib import nullcontext

import pytest
import torch
from models import build, fp64_throughout
from ranked import on_ranks
from test_profile_on_ranks import OBJECTIVES, TOLERANCE, assert_same, data, profiled
from test_sharded_profiles import lora
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from geffect_fast import ranks
from geffect_fast.capture import Plan
from geffect_fast.capture.parts import mesh_over
from geffect_fast.capture.shards import shard
from geffect_fast.engines.dual.tensor import Dual
from geffect_fast.engines.forward import parameter_passes_for
from geffect_fast.errors import InputError
from geffect_fast.measure.profiler import Profiler

BY_TOKEN = {"resolve": ("group", "sample", "token")}
CASES = {
    "adapter": (lora, torch.float64, BY_TOKEN),
    "fp32": ("llama", torch.float32, BY_TOKEN),
    "tied": ("llama_tied", torch.float64, {"resolve": ("group",)}),
    "gpt2": ("gpt2", torch.float64, {"resolve": ("sample",)}),
    "experts": ("qwen2_moe", torch.float64, {"resolve": ("sample", "token")}),
    "few": (
        *("llama", torch.float64),
        {"lengths": {"forget": [5], "retain": [8, 3, 9]}, "resolve": ("sample",)},
    ),
}
ON_TWO, ON_FOUR = ("adapter", "fp32", "tied", "gpt2"), ("experts", "few")


def sharded(architecture, dtype=torch.float32, seed=0):
    model = build(architecture, dtype, seed)
    shard(model, ranks.here(), torch.device("cpu"))
    return model


def of_cases(is_sharded, names):
    found = {}
    for name in names:
        architecture, dtype, given = CASES[name]
        models = {}
        if is_sharded:
            models = {"model": sharded(architecture, dtype)}
            models["reference_model"] = sharded(architecture, dtype, seed=7)
        found[name] = profiled(architecture, dtype, engine="forward", **models, **given)
    return found


@pytest.mark.parametrize(
    ("size", "names"), [(2, ON_TWO), pytest.param(4, ON_FOUR, marks=pytest.mark.slow)]
)
def test_sharded_models_give_what_one_process_finds(size, names):
    alone = of_cases(False, names)
    for found in on_ranks(size, of_cases, True, names):
        for name, one in alone.items():
            assert_same(one, found[name], TOLERANCE[CASES[name][1]])


def profiler_of(model, **given):
    return Profiler.of(model, None, **data(), token_budget=24, **given)


def measured_by_groups_of_its_own(is_sharded):
    """A model as its user wraps it, with groups within groups."""
    model = build("llama", torch.float64)
    layers = model.model.layers
    seen = []
    if is_sharded:
        how = {"mesh": mesh_over(ranks.here(), torch.device("cpu"))}
        for layer in layers:
            fully_shard(layer.mlp, **how, reshard_after_forward=layer is layers[0])
            fully_shard(layer, **how)
        fully_shard(model, **how)

        def look(_module, args):
            if isinstance(args[0], Dual):
                here = (layers[1].self_attn.q_proj, model.lm_head, layers[0].self_attn.q_proj)
                seen.append([type(module.weight) for module in here])

        layers[1].mlp.register_forward_pre_hook(look)
    reference = build("llama", torch.float64, seed=7)
    with fp64_throughout():
        profiler = profiler_of(
            model, objectives=OBJECTIVES, reference_model=reference, resolve=("sample", "token")
        )
        found = profiler.measure(weights=True).dataset
    if is_sharded:
        assert seen and all(each == [Dual, Dual, DTensor] for each in seen)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    return found


def test_a_direction_is_whole_for_as_long_as_its_weights():
    one = measured_by_groups_of_its_own(False)
    assert "token_weight" in one
    for found in on_ranks(2, measured_by_groups_of_its_own, True):
        assert_same(one, found, TOLERANCE[torch.float64])


def passes_of_a_sharded_model():
    plan = Plan.of(sharded("llama"), may_be_sharded=True)
    sizes = {name: 4 * p.numel() for name, p in plan.parameters.items()}
    in_a_block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    in_the_root = sum(size for name, size in sizes.items() if ".layers." not in name)
    own, everyone = 4 * sum(p.numel() for p in plan.held.values()), ranks.here()
    one = max(everyone.meet(own)) + 2 * in_a_block + in_the_root  # the next group is on its way
    short = int(everyone.rank == 1)  # a byte less
    return [
        [each.risks for each in parameter_passes_for(plan, [0] * len(sizes), 3, room)]
        for room in (2 * one, 2 * one - short)
    ]


def test_as_many_directions_move_as_their_parts_and_two_blocks_leave_room_for_on_all_ranks():
    for found in on_ranks(2, passes_of_a_sharded_model):
        assert found == [[(0, 1), (2,)], [(0,), (1,), (2,)]]


def in_a_dual_pass(_module, args):
    if isinstance(args[0], Dual):
        raise InputError("no luck: try again")


def fails_in_the_middle(how):
    model = sharded("llama")
    profiler = profiler_of(model, objectives=["ga"], engine="forward", resolve=("sample",))
    hook = nullcontext()
    if how == "alike" or torch.distributed.get_rank() == 1:
        hook = model.model.layers[1].mlp.register_forward_pre_hook(in_a_dual_pass)
    with hook, pytest.raises(InputError) as error:
        profiler.measure()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return str(error.value), profiler.measure().dataset if how == "alike" else None


def test_an_error_of_one_rank_within_a_block_ends_all():
    (first, _), (second, _) = on_ranks(2, fails_in_the_middle, "one")
    assert (first, second) == ("rank 1: no luck: try again", "no luck: try again")


def test_a_model_is_right_after_an_error_within_a_block():
    given = {"objectives": ["ga"], "engine": "forward", "resolve": ("sample",)}
    alone = profiler_of(build("llama"), **given).measure().dataset
    for said, found in on_ranks(2, fails_in_the_middle, "alike"):
        assert said == "no luck: try again"
        assert_same(alone, found, TOLERANCE[torch.float32])

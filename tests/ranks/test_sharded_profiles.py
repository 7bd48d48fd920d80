"""Models whose parameters FSDP2 shares out give the numbers of one process."""

from math import inf, isfinite

import pytest
import torch
from architectures import ARCHITECTURES
from models import build
from ranked import on_ranks
from test_profile_on_ranks import OBJECTIVES, TOLERANCE, assert_same, profiled
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from geffect_fast import ranks
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.exchange import Gathered
from geffect_fast.capture.parts import mesh_over
from geffect_fast.capture.shards import shard
from geffect_fast.engines import reverse, sharded_products
from geffect_fast.engines.known_models import packs_by_its_code
from geffect_fast.errors import GEffectError, InputError, NonFiniteError, UnsupportedModelError


def lora():
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(ARCHITECTURES["llama"](), adapter)


PLACES = {"resolve": ("sample", "position"), "conflicts": True}
PLACES |= {"objectives": ["ga - 1.5*wga(alpha=1)", "0.5*ga + 2*gd"]}
PLACES |= {"lengths": {"forget": [5, 3, 4], "retain": [6, 4]}}
CURVED = {"second_order": True, "resolve": ("group",), "objectives": ["ga", "gd"]}
CURVED |= {"lengths": {"forget": [5, 7, 4], "retain": [8, 3]}}
CASES = {
    "adapter": (lora, torch.float64, {}),
    "fp32": ("llama", torch.float32, {}),
    "tied": ("llama_tied", torch.float64, {}),
    "gpt2": ("gpt2", torch.float64, {}),
    "experts": ("qwen2_moe", torch.float64, {}),
    "position": ("llama", torch.float64, {"resolve": ("sample", "position")}),
    "places": ("qwen2_moe", torch.float64, PLACES),
    "tied places": ("llama_tied", torch.float64, PLACES),
    "sums": ("llama_tied", torch.float64, {"resolve": ("parameter",)}),
    "bare": ("llama", torch.float64, {"norms": False, "resolve": ("group", "sample")}),
    "metric": ("llama", torch.float64, {"metric": "adam", "step_of": OBJECTIVES[0]}),
    "conflicts": ("llama_tied", torch.float64, {"conflicts": True, "resolve": ("group",)}),
    "curved": ("llama_tied", torch.float64, CURVED),
    "curved norms": ("gpt2", torch.float32, CURVED),
    "curved experts": ("qwen2_moe", torch.float64, CURVED),
    "few": ("llama", torch.float64, {"lengths": {"forget": [5], "retain": [8, 3, 9]}}),
}

COPIES = ("experts", "tied places", "sums", "metric", "curved")
"""Cases in which four ranks hold two copies of the model, each in two parts."""
ON_FOUR = (*COPIES, "fp32", "tied", "gpt2", "few")
ON_TWO = tuple(name for name in CASES if name not in ("tied places", "curved", "few"))


def lists_of(model):
    return [module for module in model.modules() if isinstance(module, nn.ModuleList)]


def of_cases(sharded, names):
    found = {}
    for name in names:
        architecture, dtype, given = CASES[name]
        models = {}
        if sharded:
            models = {"model": build(architecture, dtype)}
            models["reference_model"] = build(architecture, dtype, seed=7)
            for model in models.values():
                if name == "few":
                    fully_shard(model, mesh=mesh_over(ranks.here(), torch.device("cpu")))
                elif name in COPIES and ranks.here().size == 4:
                    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
                    for block in max(lists_of(model), key=len):
                        fully_shard(block, mesh=mesh)
                    fully_shard(model, mesh=mesh)
                else:
                    shard(model, ranks.here(), torch.device("cpu"))
                with torch.no_grad():
                    model(input_ids=torch.arange(5)[None])  # this leaves the root whole
                assert is_sharded(model)
        found[name] = profiled(architecture, dtype, engine="reverse", **models, **given)
    return found


@pytest.mark.parametrize(
    ("size", "names"), [(2, ON_TWO), pytest.param(4, ON_FOUR, marks=pytest.mark.slow)]
)
def test_sharded_models_give_what_one_process_finds(size, names):
    alone = of_cases(False, names)
    for found in on_ranks(size, of_cases, True, names):
        for name in names:
            assert_same(alone[name], found[name], TOLERANCE[CASES[name][1]])


BY_ROWS = ("tied", "gpt2", "experts")


def by_rows():
    found, plain = {}, sharded_products._bytes_of_rows
    with pytest.MonkeyPatch.context() as patch:

        def nothing(described, shape):
            return 1 if isfinite(plain(described, shape)) else inf

        patch.setattr(sharded_products, "_bytes_of_rows", nothing)
        for name in BY_ROWS:
            architecture, dtype, given = CASES[name]
            models = {"model": build(architecture, dtype)}
            models["reference_model"] = build(architecture, dtype, seed=7)
            for model in models.values():
                shard(model, ranks.here(), torch.device("cpu"))
            found[name] = profiled(architecture, dtype, engine="reverse", **models, **given)
    return found


@pytest.mark.slow
def test_rows_that_go_to_parts_of_directions_give_the_same():
    alone = of_cases(False, BY_ROWS)
    for found in on_ranks(3, by_rows):
        for name, own in found.items():
            assert_same(alone[name], own, TOLERANCE[torch.float64])
            rows = own.attrs["exchanged"].split(" ")[10]
            assert float(rows) > 0, own.attrs["exchanged"]


class Branches(nn.Module):
    """A module of which a rank may use one half alone, as tokens use an expert."""

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
    fully_shard(model, mesh=mesh_over(ranks.here(), torch.device("cpu")))
    plan, rank = Plan.of(model, may_be_sharded=True), torch.distributed.get_rank()
    model.always.bias.grad = torch.ones_like(model.always.bias)
    with plan.summing():
        loss = model(x[rank], both=rank == 0).square().sum()
        own = plan.sharded_gradients(loss, list(plan.parameters.values()), more=False)
    found = [
        Gathered(part[None], plan.shards.own(p)).arrived()[0]
        for part, p in zip(own, plan.parameters.values(), strict=True)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (model.always.bias.grad.full_tensor() == 1).all()  # as the program left it
    return True


def test_what_one_rank_does_not_use_is_added_up_as_zero():
    assert on_ranks(2, gradients_of_branches) == [True, True]


def known_of_parts():
    """Whether code alone shows the layout of a model, as it is and with a hook of its user."""
    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    plan = Plan.of(model, may_be_sharded=True)
    before = packs_by_its_code(plan)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return before, packs_by_its_code(plan)


def test_what_brings_weights_leaves_a_layout_known():
    assert on_ranks(2, known_of_parts) == [(True, False)] * 2


def no_luck(*_):
    raise InputError("no luck: try again")


def one_fails(how):
    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    if how == "alike" or torch.distributed.get_rank() == 1:
        reverse.model_outputs = no_luck
    with pytest.raises(InputError) as first:
        profiled("llama", torch.float32, model=model, reference_model=None, objectives=["ga"])
    with pytest.raises(GEffectError) as second:
        profiled("llama", torch.float32, model=model, reference_model=None, objectives=["ga"])
    return str(first.value), str(second.value)


def one_part_is_broken():
    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    if torch.distributed.get_rank() == 1:
        own = model.lm_head.weight.to_local()
        with torch.no_grad():
            own[0, 0] = torch.nan
    with pytest.raises(NonFiniteError) as error:
        profiled("llama", torch.float32, model=model, reference_model=None, objectives=["ga"])
    return str(error.value)


def test_what_is_wrong_with_one_part_ends_all():
    first, own = on_ranks(2, one_part_is_broken)
    assert own.startswith("model: lm_head.weight holds 1 NaN")
    assert first == f"rank 1: {own}"


def some_ranks():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    model = build("llama")
    fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedModelError) as error:
        profiled("llama", torch.float32, model=model, reference_model=None, objectives=["ga"])
    return str(error.value)


def sums_in_16_bits():
    model = build("llama", torch.bfloat16)
    fully_shard(model, mesh=mesh_over(ranks.here(), torch.device("cpu")))
    with pytest.raises(UnsupportedModelError) as error:
        profiled("llama", torch.bfloat16, model=model, reference_model=None, objectives=["ga"])
    return str(error.value)


def test_sums_in_16_bits_are_refused():
    for said in on_ranks(2, sums_in_16_bits):
        assert said.startswith("model: FSDP adds up its gradients in torch.bfloat16; give fully")


def test_a_model_is_shared_out_among_all_ranks():
    for said in on_ranks(4, some_ranks):
        assert (
            "over (2,) of 4 ranks; shard every parameter by fully_shard over the same mesh" in said
        )


def test_an_error_of_one_rank_between_exchanges_ends_all():
    one, other = on_ranks(2, one_fails, "one", fails=True)
    assert one[0] == "rank 1: no luck: try again"
    assert other[0] == "no luck: try again"
    assert {found[1].partition(":")[0] for found in (one, other)} == {"process group"}


def test_an_error_of_all_ranks_leaves_the_group():
    for said in on_ranks(2, one_fails, "alike"):
        assert said == ("no luck: try again", "no luck: try again")


def goes_on():
    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    given = {"model": model, "reference_model": None, "objectives": ["ga"], "engine": "reverse"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reverse, "backwards", no_luck)  # the forward is done, and weights are whole
        with pytest.raises(InputError):
            profiled("llama", torch.float32, **given)
    return profiled("llama", torch.float32, **given)


def test_a_model_is_right_after_an_error_in_the_middle():
    given = {"reference_model": None, "objectives": ["ga"], "engine": "reverse"}
    alone = profiled("llama", torch.float32, **given)
    for found in on_ranks(2, goes_on):
        assert_same(alone, found, TOLERANCE[torch.float32])

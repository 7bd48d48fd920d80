"""Every objective on two ranks, the model whole and in parts, by both engines."""

import re

import pytest
import torch
from models import build, fp64_throughout, samples
from ranked import on_ranks
from test_profile_on_ranks import assert_same

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture.shards import shard
from geffect_fast.objectives import available

FORGET = [
    row
    | {"alternative": samples([n], 20 + n, 2)[0]}
    | {"weights": [(n + i) % 4 / 2 for i in range(sum(y != -100 for y in row["labels"][1:]))]}
    for n, row in zip((6, 9, 4), samples([9, 5, 12], 1, 2), strict=True)
]
DATA = {"forget": FORGET, "retain": samples([8, 6], 2, 2)}
OBJECTIVES = [
    *("ga", "gd", "nll", "wga(alpha=1.5)", "token_weights", "satimp(beta1=2, beta2=0.5)"),
    *("npo(beta=0.5) + 2*kl", "tnpo(beta=3)", "wtnpo(beta=3, alpha=0.5)", "po"),
    *("simnpo(beta=2, delta=0.1)", "dpo(beta=0.5)", "altpo(beta=0.3)"),
    *("ceu(skip=0)", "undial(beta=2)"),
    *("pdu(gamma=0.5, eps=0.3, dual=2)", "rmu(layer=1, c=3)", "rmu_mask(layer=2) + rr(layer=2)"),
]


def profiled(kind):
    """Profiles by sample with the reverse engine, and by token with the forward one."""
    model, other = (build("llama", torch.float64, seed) for seed in (0, 1))
    for each in (model, other) if kind == "parts" else ():
        shard(each, ranks.here(), torch.device("cpu"))
    given = DATA | {"objectives": OBJECTIVES, "reference_model": other, "token_budget": 40}
    with fp64_throughout():
        return [
            gf.profile(model, None, **given, resolve=("group", "sample"), engine="reverse"),
            gf.profile(model, None, **given, resolve=("sample", "token")),
        ]


def test_every_objective_is_among_them():
    assert set(available()) <= set(re.findall(r"[a-z_]+", " ".join(OBJECTIVES)))


def both():
    return [profiled(kind) for kind in ("whole", "parts")]


@pytest.mark.slow
def test_ranks_find_what_one_process_finds_of_every_objective():
    alone = profiled("whole")
    for of_rank in on_ranks(2, both):
        for found in of_rank:
            for one, other in zip(alone, found, strict=True):
                assert_same(one, other, 1e-12)

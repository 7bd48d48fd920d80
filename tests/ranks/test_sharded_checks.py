"""`check` of models that FSDP2 shares out, by all ranks together, equals that of one process."""

import os

import pytest
import torch
from models import build, samples
from ranked import commanded, on_ranks

from geffect_fast import ranks
from geffect_fast.capture import layer_rules as rules
from geffect_fast.capture.shards import shard
from geffect_fast.data import write_jsonl
from geffect_fast.errors import InputError
from geffect_fast.measure import plain_autograd
from geffect_fast.measure.check import check

ROWS = samples([7, 12, 20, 5], prompt=3)
PAIRS = [
    row | {"alternative": other}
    for row, other in zip(ROWS, samples([9, 4, 6, 11], 5, prompt=2), strict=True)
]
CASES = {
    "tied": ("llama_tied", torch.float64, {}),
    "several batches": ("gpt2", torch.float32, {"token_budget": 20}),
    "experts": ("qwen2_moe", torch.float64, {"samples": 2}),
    "pairs": (
        *("llama", torch.float64),
        {"data": PAIRS, "objectives": "dpo(beta=0.2),npo+0.5*kl,rmu(layer=1),gd", "samples": 3},
    ),
    "wider": ("llama", torch.bfloat16, {"samples": 2}),
    "two gradients at a time": ("llama", torch.float64, {"samples": 3}),
    "wrong": ("llama", torch.float32, {"samples": 2}),
}
ON_THREE = ("tied", "experts", "two gradients at a time")
ON_TWO = tuple(name for name in CASES if name not in ON_THREE)
SUMS = rules.NormCall.sums


def twice(self, g, rows):
    return 2 * SUMS(self, g, rows)


def checked(name, sharded):
    architecture, dtype, more = CASES[name]
    model, reference = build(architecture, dtype), build(architecture, dtype, seed=1)
    for each in (model, reference) if sharded else ():
        shard(each, ranks.here(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if name == "two gradients at a time":
            patch.setattr(plain_autograd, "PART_HELD", 0.0)
        if name == "wrong":
            patch.setattr(rules.NormCall, "sums", twice)
        return check(model, None, **({"data": ROWS, "reference_model": reference} | more))


def of_cases(names, sharded=True):
    return {name: checked(name, sharded) for name in names}


def others(folder):
    """The exit code of the command, and the message of a rank that is given other rows."""
    os.chdir(folder)
    words = ["check", "--model", "model", "--data", "rows.jsonl", "--shard", "fsdp", "--quiet"]
    said = commanded(words)
    model = build("llama")
    shard(model, ranks.here(), torch.device("cpu"))
    with pytest.raises(InputError) as error:
        check(model, None, data=ROWS[ranks.here().rank :], samples=2)
    return said, str(error.value)


@pytest.mark.parametrize(
    ("size", "names"), [(2, ON_TWO), pytest.param(3, ON_THREE, marks=pytest.mark.slow)]
)
def test_ranks_check_parts_as_one_process_checks_the_whole(size, names):
    alone = of_cases(names, sharded=False)
    for found in on_ranks(size, of_cases, names):
        for name, expected in alone.items():
            own = found[name]
            assert own.exact == expected.exact == (name != "wrong"), name
            for field in ("coverage", "uncovered", "unreached", "layout", "n_tokens", "wider"):
                assert getattr(own, field) == getattr(expected, field), (name, field)
            for row, other in zip(own.kinds, expected.kinds, strict=True):
                assert (row.kind, row.rules) == (other.kind, other.rules), name
                # For the wrong rule this is 1; for the others rounding.
                for quantity, error in other.relative.items():
                    near = abs(row.relative[quantity] - error) <= own.tolerance
                    assert near, (name, row.kind, quantity)


def test_the_command_checks_parts_of_the_same_rows(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    write_jsonl(ROWS, tmp_path / "rows.jsonl")
    for said, differs in on_ranks(2, others, tmp_path):
        assert said == (0, "")
        assert differs.startswith("data: rank 1 has 2 rows of digest")

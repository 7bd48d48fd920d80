"""The operations that a profile dispatches, and its waits, beside a training step's.

    python benchmarks/bench_dispatch.py            # writes benchmarks/results/dispatch_cpu.csv
    python benchmarks/bench_dispatch.py --attention eager --out FILE

On a GPU the host launches every dispatched operation: a profile of small batches takes as long as
these launches, whatever the kernels. Counts need no GPU, and do not depend on the machine.

The profile is of a Llama of 16 layers with 16 forget and 16 retain rows of 8 to 23 tokens in one
batch a set, one objective, two risks. Operations are counted as they arrive below autograd
(`TorchDispatchMode`): a composed operation of torch counts as its parts, a backward counts, a
kernel of this package is one. Waits are the operations whose result the host reads
(`aten::_local_scalar_dense`) or whose size depends on values (`aten::nonzero`). A training step is
the model's own forward and backward of the forget rows with gradients of all weights, under the
attention that the passes run (`packed_attention`, which hands sequences to sdpa one by one; models
with eager attention run as they are).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write_csv
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import make_batches, tokenize_rows
from geffect_fast.engines.batches import Collect, DataPass, passes_for
from geffect_fast.engines.directions import accumulate_gradients
from geffect_fast.engines.forward import forward_effects, parameter_passes_for
from geffect_fast.engines.model_outputs import packed_attention
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.measure.profiler import Profiler
from geffect_fast.objectives import NLL, parse

ATTENTION = ("eager", "sdpa")
RESOLVE = {"reverse": ("parameter", "sample"), "forward": ("sample", "token")}
BUDGET = 4000
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class Dispatched(TorchDispatchMode):
    """A count of the operations that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Operations and waits of a second run, as a first run may register or try something."""
    run()
    with Dispatched() as found:
        run()
    waits = sum(n for name, n in found.calls.items() if name.startswith(WAITS))
    return found.calls.total(), waits


def make_llama(attention: str) -> nn.Module:
    """A Llama of 16 narrow layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def rows(seed: int) -> list[dict[str, list[int]]]:
    """16 sequences of random tokens, all of them labelled."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 24, (16,), generator=generator).tolist()
    drawn = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def measure(attention: str) -> list[dict[str, Any]]:
    """The table's rows for one attention."""
    model, plan = make_llama(attention), Plan.of(make_llama(attention))
    data = {"forget": rows(0), "retain": rows(1)}
    sets = {name: tokenize_rows(each, None, name=name) for name, each in data.items()}

    def batches_of(name: str, roles: Any) -> Any:
        return make_batches(sets[name], roles, token_budget=BUDGET)

    risks = [DataPass(batches_of(name, ("answer",)), {m: NLL()}) for m, name in enumerate(sets)]
    passes = passes_for([parse("ga")], batches_of, {"forget": 0, "retain": 16})
    (batch,) = passes[0].batches

    def ignore(*_: Any) -> None:
        pass

    collect: Collect = ignore

    def step() -> None:
        with packed_attention(plan.model, batch):
            ids, positions = batch.input_ids, batch.position_ids
            found = plan.model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
            found.loss.backward()
        plan.model.zero_grad(set_to_none=True)

    def risk_gradients() -> dict[str, torch.Tensor]:
        return accumulate_gradients(plan, risks, len(risks), Reference(), ignore)[1]

    directions = risk_gradients()

    def objective_pass(engine: str) -> None:
        given = (plan, passes, directions, 1, Reference(), collect)
        if engine == "reverse":
            reverse_effects(*given, norms=False, tick=ignore)
        else:
            moving = parameter_passes_for(plan, [0] * len(plan.parameters), len(risks))
            forward_effects(*given, parameter_passes=moving, per_token=True, tick=ignore)

    table = [("", "training step", *counted(step))]
    for engine, resolve in RESOLVE.items():
        given: dict[str, Any] = {
            **data,
            "objectives": ["ga"],
            "engine": engine,
            "resolve": resolve,
            "token_budget": BUDGET,
        }
        profiler = Profiler.of(model, None, **given)
        jobs: dict[str, Callable[[], Any]] = {
            "preparing": partial(Profiler.of, model, None, **given),
            "risk gradients": risk_gradients,
            "objective pass": partial(objective_pass, engine),
            "measuring": profiler.measure,
            "whole profile": partial(gf.profile, model, None, **given),
        }
        table += [(engine, phase, *counted(run)) for phase, run in jobs.items()]
    of = table[0][2]
    return [
        {
            "attention": attention,
            "engine": engine,
            "phase": phase,
            "calls": calls,
            "waits": waits,
            "of_step": float(f"{calls / of:.3g}"),
        }
        for engine, phase, calls, waits in table
    ]


def main() -> None:
    """Count, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", choices=ATTENTION, action="append", help="default: all")
    parser.add_argument("--out", type=Path, default=RESULTS / "dispatch_cpu.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for attention in args.attention or ATTENTION:
        for row in measure(attention):
            found.append(row)
            print(
                f"{row['attention']:6} {row['engine']:8} {row['phase']:15} {row['calls']:7,} calls "
                f"{row['waits']:5} waits  {row['of_step']:5.2f} of a step",
                flush=True,
            )
    write_csv(args.out, found)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

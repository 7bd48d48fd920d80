"""The data that ranks exchange in a profile and in a training step, and the time of both.

    python benchmarks/bench_distributed.py            # benchmarks/results/distributed_cpu.csv
    python benchmarks/bench_distributed.py --quick    # a tiny model, 2 ranks, prints only

Ranks are processes of one thread each on the cores of one machine, which talk by gloo. A profile by
parameter and sample, of forget and retain rows, and a training step on the forget rows are measured
with the whole model on every rank (`none`) and with a part on every rank (`fsdp`). `sent_mib` is
the data that a rank sends, counted at every collective by its ring algorithm's share; `messages`
counts the collectives. `least_mib` is the data that must be sent in any case: sums of the gradients
once (`none`), and for every batch the weights of its forward, those of the blocks for its backward,
the gradients' sums, and for products directions or rows, whichever is fewer bytes (`fsdp`).
`against_one` is the time relative to one rank for the same work within one run: as the ranks share
one machine's cores, this ratio shows the cost of exchanges, not the gain of more machines.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama import make_model
from machine import RESULTS, write_csv
from package_path import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import geffect_fast as gf
from geffect_fast import ranks
from geffect_fast.capture import Plan
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import shard
from geffect_fast.data import tokenize_rows
from geffect_fast.measure.profiler import Profiler
from geffect_fast.objectives import parse
from geffect_fast.training.loss import Draws, Loss
from geffect_fast.training.single_process import single_process
from geffect_fast.training.trainer import UnlearnTrainer
from geffect_fast.training.trainer_arguments import training_arguments
from geffect_fast.unlearn_settings import Training

MIB = 2**20
N_ROWS = 16
LENGTH = 48
TOKENS = 128
"""Tokens of a batch."""


class Sent(TorchDispatchMode):
    """A count of collectives, and of the bytes that this rank sends in each.

    Attributes:
        n_bytes, messages: by the kind of the collective.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.n_bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            kind, part = _kind(name)
            if kind:
                whole = _largest([*args, found])
                self.messages[kind] += 1
                self.n_bytes[kind] += int(part * whole * (self.size - 1) / self.size)
        return found


def _kind(name: str) -> tuple[str, float]:
    """The collective's kind, and the number of times that a ring sends the whole tensor's share."""
    if "reduce_scatter" in name:
        return "reduce_scatter", 1.0
    if "allreduce" in name or "all_reduce" in name:
        return "all_reduce", 2.0
    if "allgather" in name or "all_gather" in name:
        return "all_gather", 1.0
    if "alltoall" in name or "all_to_all" in name:
        return "all_to_all", 0.5  # sent and received data are equal, and both count
    return ("broadcast", 1.0) if "broadcast" in name else ("", 0.0)


def _largest(given: Any) -> int:
    """Bytes of the largest tensor or list of tensors: the data that is gathered, or added up."""
    if isinstance(given, torch.Tensor):
        return given.nbytes
    if isinstance(given, list | tuple):
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        others = [_largest(x) for x in given if isinstance(x, list | tuple)]
        same = len({x.shape for x in tensors}) == 1
        own = sum(x.nbytes for x in tensors) if same and len(tensors) > 1 else 0
        return max([own, *others, *(x.nbytes for x in tensors)], default=0)
    return 0


def rows(seed: int) -> list[dict[str, list[int]]]:
    """Tokenised rows, labels on all but the first token."""
    ids = torch.randint(3, 8000, (N_ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids.tolist()]


def timed(work: Callable[[], Any]) -> tuple[float, Sent]:
    """Seconds of the work of all ranks, and the data that this rank sent."""
    size = ranks.here().size
    if size > 1:
        dist.barrier()
    start = time.perf_counter()
    with Sent(size) as sent:
        work()
    return time.perf_counter() - start, sent


def step(model: Any) -> dict[str, Any]:
    """A training step on the existing ranks: seconds, and sent data."""
    together = ranks.here()
    n_elements = sum(p.numel() for p in model.parameters())
    n_in_blocks = sum(p.numel() for p in model.model.layers.parameters())
    forget = tokenize_rows(rows(1), None, name="forget")
    loss = Loss(parse("ga"), {"forget": forget}, TOKENS, "packed", "token")
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, single_process(cpu):
        trainer = UnlearnTrainer(
            model,
            training_arguments(Training(steps=9), folder, cpu),
            loss=loss,
            draws=Draws({"forget": (N_ROWS, N_ROWS)}, 9, seed=0),
            reference=None,
            ranks=together,
            shards=Plan.of(model, may_be_sharded=True).shards,
        )
        every = {"forget": range(N_ROWS)}
        trainer.training_step(model, every)
        model.zero_grad()
        seconds, sent = timed(lambda: trainer.training_step(model, every))
    n_batches = sum(len(each.batches) for each in trainer.loss.passes(every))
    n_batches = -(-n_batches // together.size)
    least = 2 * n_elements
    if is_sharded(model):
        least = n_batches * (2 * n_elements + n_in_blocks)
    return row("step", n_elements, n_batches, sent, least, seconds)


def row(
    what: str, n_elements: int, n_batches: int, sent: Sent, least: float, seconds: float
) -> dict[str, Any]:
    """A row for one rank, where `least` elements in fp32 go through a ring."""
    size = ranks.here().size
    return {
        "what": what,
        "ranks": size,
        "parameters": n_elements,
        "batches": n_batches,
        "messages": sum(sent.messages.values()),
        "sent_mib": round(sum(sent.n_bytes.values()) / MIB, 2),
        "least_mib": round(4 * least * (size - 1) / size / MIB, 2),
        "seconds": seconds,
    }


def profile(model: Any) -> dict[str, Any]:
    """A profile on the existing ranks: seconds, and sent data."""
    n_elements = sum(p.numel() for p in model.parameters())
    n_in_blocks = sum(p.numel() for p in model.model.layers.parameters())
    given: dict[str, Any] = {"forget": rows(1), "retain": rows(2), "objectives": ["ga"]}
    given["token_budget"] = TOKENS
    profiler = Profiler.of(model, None, resolve=("parameter", "sample"), **given)
    profiler.measure()
    n_risks = len(profiler.risk_names)
    seconds, sent = timed(profiler.measure)
    n_batches = {
        "risks": sum(len(each.batches) for each in profiler._schedule.risk_passes),
        "objectives": sum(len(each.batches) for each in profiler._schedule.passes),
    }
    least = 2 * (n_risks + 1) * n_elements  # each risk's gradient is added up, and the objective's
    if is_sharded(model):
        least = sum(n_batches.values()) * (2 * n_elements + n_in_blocks)
        assert profiler.plan.shards is not None
        least += sum(profiler.plan.shards.came.values()) / 4
    return row("profile", n_elements, sum(n_batches.values()), sent, least, seconds)


def measured(sharding: str, quick: bool) -> list[dict[str, Any]]:
    """A row for each kind of work, on the existing ranks."""
    found = []
    for work in (profile, step):
        model = make_model(quick)
        if sharding == "fsdp":
            shard(model, ranks.here(), torch.device("cpu"))
        found.append({"sharding": sharding, **work(model)})
    return found


def run(size: int, sharding: str, quick: bool) -> list[dict[str, Any]]:
    """The first rank's result of several ranks, each a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
        ]
        command += [str(size), __file__, "--rank", sharding, str(out)] + ["--quick"] * quick
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: list[dict[str, Any]] = torch.load(out, weights_only=True)
    return found


def main() -> None:
    """Run every number of ranks and sharding, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank", nargs=2, metavar=("SHARDING", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        sharding, out = arguments.rank
        dist.init_process_group("gloo")
        found = measured(sharding, arguments.quick)
        if dist.get_rank() == 0:
            torch.save(found, out)
        dist.destroy_process_group()
        return
    cases = [(1, "none"), (2, "none"), (2, "fsdp")]
    cases += [] if arguments.quick else [(4, "none"), (4, "fsdp")]
    table = [each for size, sharding in cases for each in run(size, sharding, arguments.quick)]
    alone = {each["what"]: each["seconds"] for each in table if each["ranks"] == 1}
    for each in table:
        each["against_one"] = round(each["seconds"] / alone[each["what"]], 2)
        each["seconds"] = float(f"{each['seconds']:.3g}")
        print(each)
    if not arguments.quick:
        write_csv(RESULTS / "distributed_cpu.csv", table)


if __name__ == "__main__":
    assert gf.__version__
    main()

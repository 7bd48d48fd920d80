"""Per-sample norms, one direction and all pairs against other exact ways, on a CPU.

    python benchmarks/bench_per_sample.py            # writes benchmarks/results/per_sample_cpu.csv
    python benchmarks/bench_per_sample.py --quick    # a tiny model, two rounds, prints only

Every time is a multiple of the training step on the same tokens: forward, backward with the
parameters' gradients, no optimizer. The two halves of a profile are timed as well: one objective's
effects on two risks, by sample and parameter, and one risk's gradient. Every contestant's numbers
are compared with plain autograd in fp64, one sample at a time, before the contestant is timed;
`error` is the largest difference relative to the largest number. The contestants run in turns, so
that other load on the machine slows all alike; one that is much slower than the fastest in two
rounds leaves. On a busy machine the least times of two contestants may come from different minutes,
so `of_best_peer` compares within rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama import make_model
from machine import RESULTS, peak_extra_bytes, write_csv
from per_sample_peers import Direction, peers, sample_losses
from torch import Tensor, nn

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.data import estimate_token_budget, make_batches, tokenize_rows
from geffect_fast.engines.batches import DataPass, passes_for
from geffect_fast.engines.directions import accumulate_gradients
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.objectives import NLL, parse

SHAPES = [(32, 32), (8, 128), (4, 512)]
QUICK_SHAPES = [(5, 12), (2, 80)]
TOLERANCE = 1e-3
SLOW = 1.5
"""A contestant that takes more than `SLOW` x the time of its quantity's fastest is timed in `TRIES`
rounds."""

TRIES = 2
"""Rounds of a slow contestant, as one could be slow by chance."""

OURS, STEP = "geffect_fast", "training step"
Contestants = dict[tuple[str, str], Callable[[], Any]]


# ---- the truth ----


def truth(model: nn.Module, ids: Tensor, directions: list[Direction]) -> dict[str, Tensor]:
    """Every quantity from plain autograd in fp64, one sample at a time, by the quantity's name.

    Gradients are kept rounded to fp32 for the pairs; their products are summed in fp64.
    """
    model = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters()]
    norms, products, kept = [], [], []
    for i in range(len(ids)):
        loss = sample_losses(model, ids[i : i + 1])[0]
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        )
        norms.append(gradient.norm())
        flat = [torch.cat([v[name].flatten() for name in names]) for v in directions]
        products.append(torch.stack([gradient @ v.double() for v in flat]))
        kept.append(gradient.float())
    pairs = torch.zeros(len(ids), len(ids), dtype=torch.float64)
    for blocks in zip(*(g.split(1 << 18) for g in kept), strict=True):
        block = torch.stack(blocks).double()
        pairs += block @ block.T
    by_direction = torch.stack(products, dim=1)
    return {
        "norms": torch.stack(norms),
        "direction": by_direction[0],
        "pairs": pairs,
        "one objective, two risks": by_direction,
        "gradient of one risk": by_direction[0].mean(),
    }


# ---- the contestants ----


def functions(model: nn.Module, ids: Tensor, direction: Direction) -> Contestants:
    """`gf.functional` as another package calls it."""
    batch = {"input_ids": ids}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return sample_losses(model, batch["input_ids"])

    of = gf.functional
    return {
        ("norms", OURS): partial(of.per_sample_grad_norms, model, loss_fn, batch),
        ("direction", OURS): partial(
            of.per_sample_inner_products, model, loss_fn, batch, direction
        ),
        ("pairs", OURS): partial(of.pairwise_inner_products, model, loss_fn, batch, batch),
    }


def profile_parts(model: nn.Module, ids: Tensor, directions: list[Direction]) -> Contestants:
    """The two halves of a profile, batched as it would batch them."""
    n = len(ids)
    plan = Plan.of(model)
    samples = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    data = tokenize_rows(samples, None, name="forget")
    budget = estimate_token_budget(model, n_directions=2)
    batches = make_batches(data, ("answer",), token_budget=budget)
    passes = passes_for([parse("ga")], lambda *_: batches, {"forget": 0})
    risk = [DataPass(batches, {0: NLL()})]
    stacked = {name: torch.stack([v[name] for v in directions]) for name in plan.parameters}

    def effects() -> Tensor:
        found = torch.zeros(len(directions), n, dtype=torch.float64)

        def collect(_task: DataPass, batch: Any, values: Tensor) -> None:
            found[:, batch.rows] += values[0].sum(1)

        reverse_effects(
            plan, passes, stacked, 1, Reference(), collect, norms=False, tick=lambda _: None
        )
        return -n * found  # `ga` is minus the mean over samples, all of one length

    def risk_gradient() -> Tensor:
        _, gradients = accumulate_gradients(plan, risk, 1, Reference(), lambda _: None)
        products = [(gradients[name][0] * v).sum() for name, v in directions[0].items()]
        return torch.stack(products).sum()

    return {
        ("one objective, two risks", OURS): effects,
        ("gradient of one risk", OURS): risk_gradient,
    }


def training_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward; the gradients are dropped."""
    model.zero_grad(set_to_none=True)
    sample_losses(model, ids).mean().backward()
    model.zero_grad(set_to_none=True)


# ---- measurements ----


def error(found: Tensor, true: Tensor) -> float:
    """The largest difference relative to the largest number."""
    return float((found.double() - true).abs().max() / true.abs().max())


def measure(model: nn.Module, shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """All contestants on `shape` tokens: compared with the truth, then timed."""
    generator = torch.Generator().manual_seed(shape[0])
    ids, *others = torch.randint(3, 8192, (3, *shape), generator=generator)
    directions: list[Direction] = [
        dict(zip(dict(model.named_parameters()), gradient, strict=True))
        for gradient in (
            torch.autograd.grad(sample_losses(model, other).mean(), list(model.parameters()))
            for other in others
        )
    ]
    expected = truth(model, ids, directions)
    contestants: Contestants = {
        **functions(model, ids, directions[0]),
        **{
            (quantity, name): run
            for quantity, of in peers(model, ids, directions[0]).items()
            for name, run in of.items()
        },
        **profile_parts(model, ids, directions),
    }
    errors, memory = {}, {}
    for (quantity, name), run in contestants.items():
        found: list[Tensor] = []
        memory[quantity, name] = peak_extra_bytes(lambda: found.append(run()))  # noqa: B023
        errors[quantity, name] = error(found.pop(), expected[quantity])
    step = ("", STEP)
    quantities = list(dict.fromkeys(quantity for quantity, _ in contestants))
    # Contestants run one after the other while results are compared.
    contestants = dict(sorted(contestants.items(), key=lambda item: quantities.index(item[0][0])))
    runs: dict[tuple[str, str], Callable[[], Any]] = {
        step: partial(training_step, model, ids),
        **contestants,
    }
    memory[step] = peak_extra_bytes(runs[step])
    seconds = in_turns(runs, rounds)
    fastest_step = min(seconds[step])
    return [
        {
            "samples": shape[0],
            "length": shape[1],
            "quantity": key[0],
            "contestant": key[1],
            "min_s": round(min(times), 4),
            "median_s": round(statistics.median(times), 4),
            "rounds": len(times),
            "of_step": round(min(times) / fastest_step, 3),
            "of_best_peer": of_best_peer(key, seconds),
            "peak_extra_mb": round(memory[key] / 2**20, 1),
            "error": f"{errors[key]:.1e}" if key in errors else "",
        }
        for key, times in seconds.items()
    ]


def of_best_peer(key: tuple[str, str], seconds: dict[tuple[str, str], list[float]]) -> float | str:
    """The median over rounds of our time over a peer's, the largest over all peers."""
    if key[1] != OURS:
        return ""
    ratios = [
        statistics.median(a / b for a, b in zip(seconds[key], times, strict=False))
        for (quantity, name), times in seconds.items()
        if quantity == key[0] and name != OURS
    ]
    return round(max(ratios), 3) if ratios else ""


def in_turns(
    runs: dict[tuple[str, str], Callable[[], Any]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every round; slow ones leave early. Every other round goes backwards."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for index in range(rounds):
        for key in list(runs)[:: -1 if index % 2 else 1]:
            fastest = min(
                (min(t) for (quantity, _), t in seconds.items() if quantity == key[0] and t),
                default=0.0,
            )
            if index >= TRIES and min(seconds[key]) > SLOW * fastest:
                continue
            start = time.perf_counter()
            runs[key]()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def main() -> int:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model; prints only")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default 2")
    parser.add_argument("--rounds", type=int, help="rounds in turns; default 9, 2 if quick")
    parser.add_argument("--shape", help="one shape alone, such as 8x128; prints only")
    parser.add_argument("--out", type=Path, help="where the CSV goes")
    arguments = parser.parse_args()
    quick, out = arguments.quick, arguments.out
    torch.set_num_threads(arguments.threads)
    shapes = QUICK_SHAPES if quick else SHAPES
    if arguments.shape:
        n, length = map(int, arguments.shape.split("x"))
        shapes = [(n, length)]
    elif not quick:
        out = out or RESULTS / "per_sample_cpu.csv"
    model = make_model(quick)
    rows = []
    for shape in shapes:
        for row in measure(model, shape, arguments.rounds or (2 if quick else 9)):
            rows.append(row)
            print(
                f"{row['samples']:3} x {row['length']:<4} {row['quantity']:25} "
                f"{row['contestant']:15} {row['min_s']:7.3f} s, median {row['median_s']:7.3f} of "
                f"{row['rounds']}, {row['of_step']:6.3f} steps, "
                f"{row['of_best_peer'] or '-':>5} of the best other, "
                f"{row['peak_extra_mb']:7.1f} MB, error {row['error'] or '-'}",
                flush=True,
            )
    if out is not None:
        write_csv(out, rows)
        print(f"wrote {out}")
    wrong = [row for row in rows if row["error"] and not float(row["error"]) <= TOLERANCE]
    for row in wrong:
        print(f"wrong: {row['contestant']}, {row['quantity']}, error {row['error']}")
    return int(any(row["contestant"] == OURS for row in wrong))


if __name__ == "__main__":
    sys.exit(main())

"""The forward engine against an ordinary training step and against the reverse engine.

    python benchmarks/bench_forward.py            # writes benchmarks/results/forward_cpu.csv
    python benchmarks/bench_forward.py --quick    # a tiny model, one shape, prints only

All run on the same tokens, every token labelled, with two risks. The training step is one forward
and backward with all weight gradients and no optimizer. The engines are given the risks' gradients
and find the effects of all objectives by sample; the forward engine finds them by token, and adds
up. Contestants take turns; the least of `--rounds` rounds counts, as noise only ever adds time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from machine import interleaved_minima, peak_extra_bytes, run_shapes
from torch import Tensor, nn

from geffect_fast.capture import Plan
from geffect_fast.data import SampleSet, make_batches, tokenize_rows
from geffect_fast.engines.batches import DataPass, passes_for
from geffect_fast.engines.forward import forward_effects, parameter_passes_for
from geffect_fast.engines.reference import Reference
from geffect_fast.engines.reverse import reverse_effects
from geffect_fast.objectives import parse_list
from geffect_fast.objectives.ranges import expand
from geffect_fast.results.axes import EffectArray

SHAPES = ((32, 32), (8, 128), (4, 512))
RANGES = (
    "wga(alpha=0.1:7:{n})",
    "npo(beta=0.01:4:{n},log)",
    "tnpo(beta=0.1:5:{n})",
    "simnpo(beta=0.1:5:{n})",
    "satimp(beta1=0.1:5:{n})",
)
STEP = "training step"


def sample_set(n: int, length: int) -> SampleSet:
    """`n` sequences of `length` random tokens, all of them labelled."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(n):
        ids = torch.randint(3, 8192, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return tokenize_rows(rows, None, name="forget")


def training_step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward of the mean loss."""
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def objectives_of(n: int) -> list[Any]:
    """`n` objectives, equally many of each family."""
    if n == len(RANGES):
        return parse_list("wga, npo(beta=0.1), tnpo(beta=1), simnpo(beta=2.5), satimp")
    each = n // len(RANGES)
    return [o for text in RANGES for _, o in expand(text.format(n=each)).members]


def effects(
    engine: str,
    plan: Plan,
    passes: list[DataPass],
    directions: dict[str, Tensor],
    n: int,
    samples: int,
) -> None:
    """The passes of `n` objectives by one engine."""
    array = EffectArray(torch.eye(n, dtype=torch.float64), np.zeros((n, 2, 1, samples, 1)))
    columns = [0] * len(plan.parameters)
    shared = (plan, passes, directions, n, Reference(), array.add)
    if engine == "forward":
        moving = parameter_passes_for(plan, columns, 2)
        forward_effects(*shared, parameter_passes=moving, tick=lambda n: None)
    else:
        reverse_effects(*shared, columns=columns, norms=False, tick=lambda n: None)


def contestants(model: nn.Module, n: int, length: int) -> dict[tuple[str, int], Callable[[], None]]:
    """The functions to time on one shape, by name and number of objectives."""
    plan = Plan.of(model)
    data = sample_set(n, length)
    ids = torch.stack([s.answer.input_ids for s in data.samples])
    generator = torch.Generator().manual_seed(1)
    directions = {
        name: 1e-3 * torch.randn(2, *p.shape, generator=generator)
        for name, p in plan.parameters.items()
    }

    def batches_of(_name: str, roles: tuple[Any, ...]) -> Any:
        return make_batches(
            data, roles, token_budget=n * length, reduction="token", layout="packed"
        )

    found: dict[tuple[str, int], Callable[[], None]] = {
        (STEP, 0): partial(training_step, model, ids)
    }
    for engine, count in (("forward", 5), ("forward", 200), ("reverse", 5)):
        parts = objectives_of(count)
        passes = passes_for(parts, batches_of, {"forget": 0})
        found[f"{engine} engine", count] = partial(
            effects, engine, plan, passes, directions, count, n
        )
    return found


def measure(model: nn.Module, n: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one shape."""
    runs = contestants(model, n, length)
    seconds = interleaved_minima(runs, rounds)
    memory = {key: peak_extra_bytes(run) for key, run in runs.items()}
    return [
        {
            "samples": n,
            "length": length,
            "contestant": name,
            "objectives": count,
            "risks": 2 if count else 0,
            "rounds": rounds,
            "min_s": float(f"{seconds[name, count]:.4g}"),
            "of_step": float(f"{seconds[name, count] / seconds[STEP, 0]:.4g}"),
            "peak_extra_mb": round(memory[name, count] / 1e6, 1),
        }
        for name, count in runs
    ]


if __name__ == "__main__":
    run_shapes(
        __doc__,
        "forward_cpu.csv",
        SHAPES,
        measure,
        lambda row: (
            f"{row['contestant']:15} {row['objectives']:4} objectives {row['min_s']:8.3f} s "
            f"{row['of_step']:7.2f} of a step {row['peak_extra_mb']:8.1f} MB"
        ),
    )

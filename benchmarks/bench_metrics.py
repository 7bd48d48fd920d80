"""The cost of metrics beside a training step on the same rows, on a CPU.

    python benchmarks/bench_metrics.py            # writes benchmarks/results/metrics_cpu.csv
    python benchmarks/bench_metrics.py --quick    # a tiny model, two rounds, prints only

Norms are given as multiples of one training step on the same rows in the same packed batches
(forward, backward with the parameters' gradients, no optimizer), and of one backward a row (`one
backward a row`), which is what released code does for gradient-norm membership. All other metrics
are given as multiples of one forward over the same batches without gradients. Norms, whole and by
parameter, are compared with those of plain autograd, one row at a time, before anything is timed;
`error` is the largest relative difference. Contestants run in turns, so that other load on the
machine slows all alike: `of_step`, `of_by_row` and `of_forward` are medians over rounds of the
ratio to the step, the backwards and the forward of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llama import make_model
from machine import RESULTS, interleaved, write_csv
from torch import Tensor, nn

from geffect_fast.data import estimate_token_budget, tokenize_rows
from geffect_fast.data.samples import TokenSequence
from geffect_fast.engines.batches import TokenBudget
from geffect_fast.engines.model_outputs import model_outputs, packed_attention
from geffect_fast.metrics.gradient_norms import gradient_norms, mean_losses
from geffect_fast.metrics.scored import batches_of, forward_layout, score

ROWS, LENGTHS = 32, (20, 120)
"""Number of rows, and the range of their lengths: like TOFU's answers of a sentence or two."""
STEP, BY_ROW, FORWARD = "training step", "one backward a row", "one forward"
WHOLE, BY_PARAMETER = "gradient norms, whole", "gradient norms, by parameter"


def make_rows(n: int, vocabulary: int) -> list[TokenSequence]:
    """Rows of unlike lengths, a third of each a question."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*LENGTHS, (n,), generator=generator).tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return [sample.answer for sample in tokenize_rows(rows, None, name="forget").samples]


def training_step(model: nn.Module, rows: list[TokenSequence], budget: int) -> None:
    """Forward and backward over all rows, packed; the gradients are dropped."""
    for batch in batches_of(rows, TokenBudget(budget), "packed"):
        with packed_attention(model, batch):
            (mean_losses(model, {"batch": batch}).sum() / len(rows)).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def forward(model: nn.Module, rows: list[TokenSequence], budget: int) -> None:
    """The log-probabilities of all rows' labels, packed, and nothing else."""
    for batch in batches_of(rows, TokenBudget(budget), "packed"):
        with packed_attention(model, batch):
            model_outputs(model, batch)


def by_row(model: nn.Module, rows: list[TokenSequence]) -> Tensor:
    """Norms of the rows' gradients by parameter, one backward each, `(n, parameters)`."""
    norms = []
    for batch in batches_of(rows, TokenBudget(1), "single"):
        mean_losses(model, {"batch": batch}).sum().backward()
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    return torch.stack(norms).double()


def contestants(
    model: nn.Module, rows: list[TokenSequence], budget: int
) -> dict[str, Callable[[], Any]]:
    """The functions to time, by name."""
    places = [""] * len(rows)
    layout = forward_layout(model, rows)

    def norms(*needs: str) -> Callable[[], Any]:
        return lambda: gradient_norms(model, rows, needs, TokenBudget(budget), layout)

    def scored(distribution: bool) -> Callable[[], Any]:
        return lambda: score(
            model, rows, places, TokenBudget(budget), layout, distribution=distribution
        )

    return {
        STEP: lambda: training_step(model, rows, budget),
        WHOLE: norms("whole_norms"),
        BY_PARAMETER: norms("parameter_norms"),
        "gradient norms, largest entries": norms("largest_entries"),
        BY_ROW: lambda: by_row(model, rows),
        FORWARD: lambda: forward(model, rows, budget),
        "teacher-forced pass": scored(False),
        "teacher-forced pass with min-k++": scored(True),
    }


def relative_error(found: np.ndarray, expected: Tensor) -> float:
    """The largest difference of a row, relative to the expected number."""
    return float(((torch.from_numpy(found) - expected) / expected).abs().max())


def measure(model: Any, n: int, rounds: int) -> list[dict[str, Any]]:
    """A row of the table for each contestant."""
    rows = make_rows(n, model.config.vocab_size)
    budget = estimate_token_budget(model, n_directions=0)
    runs = contestants(model, rows, budget)
    expected = by_row(model, rows)
    errors = {
        name: relative_error(runs[name]()[need], wanted)
        for name, need, wanted in (
            (WHOLE, "whole_norms", expected.square().sum(1).sqrt()),
            (BY_PARAMETER, "parameter_norms", expected.mean(1)),
        )
    }
    seconds = interleaved(runs, rounds)

    def of(name: str, base: str) -> float:
        ratios = (t / s for t, s in zip(seconds[name], seconds[base], strict=True))
        return round(statistics.median(ratios), 3)

    return [
        {
            "rows": n,
            "tokens": sum(map(len, rows)),
            "token_budget": budget,
            "contestant": name,
            "median_s": round(statistics.median(times), 4),
            "of_step": of(name, STEP),
            "of_by_row": of(name, BY_ROW),
            "of_forward": of(name, FORWARD),
            "error": f"{errors[name]:.1e}" if name in errors else "",
        }
        for name, times in seconds.items()
    ]


def main() -> int:
    """Print the table, and write it unless `--quick` is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="tiny model, two rounds, print only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options.quick).eval()
    rows, rounds = (6, 2) if options.quick else (options.rows, options.rounds)
    table = measure(model, rows, rounds)
    for row in table:
        print(
            f"{row['contestant']:34} {row['median_s']:8.4f} s {row['of_step']:7.3f} steps "
            f"{row['of_forward']:7.3f} forwards"
        )
    if not options.quick:
        write_csv(RESULTS / "metrics_cpu.csv", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

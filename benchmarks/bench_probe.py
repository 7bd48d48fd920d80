"""A probe's time as a multiple of a training step's.

    python benchmarks/bench_probe.py            # about 5 minutes on two cores; writes
                                                # benchmarks/results/probe_cpu.csv
    python benchmarks/bench_probe.py --quick    # a tiny model, prints only

A training step is that of `geffect-fast unlearn`: 32 forget rows, as many retain rows where the
objective reads them, every token labelled, and an update of AdamW. A probe is that of the same run
with its default rows, norms, cosines and token weights included, its result written to a file. They
take turns; the least of `--rounds` rounds counts, as noise only ever adds time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llama import make_model, random_rows
from machine import RESULTS, write_csv

from geffect_fast.measure.sources import Sources
from geffect_fast.settings import LiveMetrics, Measuring
from geffect_fast.steps.probe import Probe
from geffect_fast.storage.step_store import StepStore
from geffect_fast.training.loss import Draws, RowReference
from geffect_fast.training.run import Unlearning
from geffect_fast.training.trainer import UnlearnTrainer
from geffect_fast.training.trainer_arguments import training_arguments
from geffect_fast.unlearn_settings import Training

ROWS, UPDATE = 64, 32
LENGTHS = (32, 128)
RUNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ga", ()),
    ("npo(beta=0.1) + kl", ()),
    ("ga", ("wga(alpha=1)", "npo(beta=0.1)", "tnpo(beta=1)")),
)


def measure(
    quick: bool, objective: str, others: tuple[str, ...], length: int, rounds: int, folder: Path
) -> dict[str, Any]:
    """One row: the time of a step and of a probe."""
    data = {"forget": random_rows(ROWS, length, 0), "retain": random_rows(ROWS, length, 1)}
    run = Unlearning(
        make_model(quick),
        None,
        Training(steps=rounds + 1, batch_size=UPDATE),
        objectives=[objective, *others],
        sources=Sources(data),
        settings=Measuring(resolve=("parameter", "sample"), norms=None, engine="auto"),
        reference_model=make_model(quick),
        live=LiveMetrics(),
    )
    draws = Draws(dict.fromkeys(run.loss.reads, (ROWS, UPDATE)), rounds + 1, seed=0)
    trainer = UnlearnTrainer(
        run.model,
        training_arguments(run.training, folder, torch.device("cpu")),
        loss=run.loss,
        draws=draws,
        reference=RowReference(make_model(quick), run.loss),
    )
    optimizer = trainer.create_optimizer()
    probe = Probe(run.profiler, StepStore(folder / "steps", run.identity), trained=objective)
    seconds = {"step": float("inf"), "probe": float("inf")}
    for step in range(rounds + 1):
        start = time.perf_counter()
        trainer.training_step(run.model, draws[step])
        optimizer.step()
        optimizer.zero_grad()
        between = time.perf_counter()
        probe.measure_at(step + 1, learning_rates=[run.training.learning_rate], optimizer=optimizer)
        end = time.perf_counter()
        if step:  # the first warms up
            seconds["step"] = min(seconds["step"], between - start)
            seconds["probe"] = min(seconds["probe"], end - between)
    return {
        "objective": objective,
        "measured": 1 + len(others),
        "length": length,
        "update_rows": UPDATE,
        "probe_rows": len(run.rows.rows["forget"]),
        "counted": float(f"{run.rows.cost:.3g}"),
        "rounds": rounds,
        "step_s": float(f"{seconds['step']:.4g}"),
        "probe_s": float(f"{seconds['probe']:.4g}"),
        "of_step": float(f"{seconds['probe'] / seconds['step']:.3g}"),
    }


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, prints only")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for length in LENGTHS[:1] if args.quick else LENGTHS:
        for objective, others in RUNS:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(args.quick, objective, others, length, args.rounds, Path(folder))
            found.append(row)
            print(
                f"{row['length']:4} tokens  {objective:20} {row['measured']} measured  "
                f"{row['probe_rows']:3} rows  step {row['step_s']:7.3f} s  probe "
                f"{row['probe_s']:7.3f} s  {row['of_step']:5.2f} of a step "
                f"(counted {row['counted']:.2f})",
                flush=True,
            )
    if not args.quick:
        path = RESULTS / "probe_cpu.csv"
        write_csv(path, found)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""Profiles end to end on a GPU, as multiples of an ordinary forward and backward.

    python benchmarks/bench_gpu_engines.py            # writes benchmarks/results/engines_<gpu>.csv
    python benchmarks/bench_gpu_engines.py --budget 100 --out /tmp/found
    python benchmarks/bench_gpu_engines.py --device cpu --tiny    # to try the script out

A Llama of Llama-3.2-1B's shape with random weights in bf16, forget and retain samples of TOFU's
lengths, two risks. A training step is a forward and backward of all forget rows without an
optimizer, packed into one row a batch or padded, in batches of the size that is fastest. Every job
is `geffect_fast.profile` whole: tokens, batches, the risks' gradients, effects, the Dataset. The
per-sample functions run beside a loop over samples and `vmap(grad)`, which sums a few samples'
gradients at a time; the algorithm published with the idea (bench_sweep.py) is timed on few
micro-batches and scaled, and `how` says how.

`kernels`, `waits` and `busy_percent` are of one more run under torch's profiler
(engines_timing.py): kernels without copies, calls of the runtime that return when the device has
caught up, and the kernels' time over that run's. `peak_gib` is what a run holds beside the models.
`difference` is how far results are from the other way to have them, largest difference over largest
value. A part that fails is a row that says why, and the others go on; a part for which no time is
left is named. Parts come in the order of their weight.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import engines_report
import numpy as np
import torch
import transformers
from bench_sweep import MICRO_BATCH, PADDED, SWEEP, make_rows, pad, published_micro_batch
from engines_jobs import JOBS, LAYOUTS, SWEPT, Job, Rows, make_model, train
from engines_runner import Row, Runner, rounded
from engines_timing import MOST_RUNS, Timed, Traced
from machine import RESULTS, commit, write_csv
from per_sample_peers import (
    loop_direction,
    loop_norms,
    loop_pairs,
    sample_losses,
    vmap_direction,
    vmap_norms,
    vmap_pairs,
)
from torch import Tensor, nn

import geffect_fast as gf

LIMIT = 30.0
"""Seconds that a part may take."""

COMPARED = ("ga", "wga(alpha=1)")
"""Objectives whose effects on the first risk are compared between jobs, by sample."""

BATCHES = (64, 256)
"""Numbers of samples in the batches of a training step. The fastest counts."""

PER_SAMPLE = (32, 64)
"""Samples and tokens of the per-sample functions."""

PAIRED = 8
"""Number of samples for all pairs. It is small because the other ways keep every gradient."""


class Bench:
    """The parts of the benchmark, on a model and a reference model.

    Args:
        runner: runs the parts.
        device: device of the models.
        tiny: tiny models, few samples, one run each.
    """

    def __init__(self, runner: Runner, device: torch.device, tiny: bool) -> None:
        self.runner, self.clock, self.device = runner, runner.clock, device
        self.sizes = (2, 4) if tiny else (64, 1024)
        self.per_sample = (4, 12) if tiny else PER_SAMPLE
        self.paired = min(PAIRED, self.per_sample[0])
        self.families = list(SWEEP)[: 1 if tiny else None]
        self.padded = 100 if tiny else PADDED
        self.most_runs = 0 if tiny else MOST_RUNS
        self.model = make_model(device, tiny, 0)
        self.reference = make_model(device, tiny, 1)
        gc.freeze()  # the garbage collector does not look through imported modules
        self.steps: dict[int, float] = {}
        self.effects: dict[tuple[int, str], np.ndarray] = {}

    def parts(self) -> Iterator[tuple[str, Callable[[], None], float]]:
        """The parts, the most important first, with the seconds that each needs at least."""
        few, many = self.sizes
        yield f"training step, {few} samples", partial(self.step, few), 0
        for job in JOBS:
            yield f"{job.name}, {few} samples", partial(self.profile, job, few), 0
        yield f"training step, {many} samples", partial(self.step, many), 0

        def with_many(jobs: Sequence[Job]) -> Iterator[tuple[str, Callable[[], None], float]]:
            for job in jobs:
                row = self.runner.found(job.name, few)
                least = 0.5 * many / few * row["seconds"] if row else 0
                yield f"{job.name}, {many} samples", partial(self.profile, job, many), least

        yield from with_many(JOBS[:2])
        yield "per-sample norms", self.norms, 0
        yield "per-sample products with a direction", self.direction, 0
        yield "products of all pairs", self.pairs, 0
        yield "published algorithm", self.published, 0
        yield from with_many(JOBS[2:])
        for job in JOBS:
            row = self.runner.found(job.name, many)
            if row:
                run = partial(self.trace, row, job)
                yield f"trace of {job.name}, {many} samples", run, row["seconds"]

    # ---- training steps and profiles ----

    def data(self, n: int) -> tuple[Rows, Rows]:
        """The forget and the retain rows."""
        return make_rows(n, 1), make_rows(n, 2)

    def step(self, n: int) -> None:
        """Time a batch of each kind, and then all rows in batches of the fastest."""
        rows = self.data(n)[0]
        tokens = sum(len(row["labels"]) for row in rows)
        rates: list[tuple[float, str, int]] = []
        for layout, made in LAYOUTS.items():
            for size in sorted({min(n, size) for size in BATCHES}):
                try:
                    run = partial(train, self.model, [made(rows[:size], self.device)])
                    timed = self.clock.measure(run, min(self.most_runs, 1))
                except torch.OutOfMemoryError:
                    self.clock.release()
                    continue
                rates.append((timed.seconds / size, layout, size))
                if size == n:
                    what = f"{engines_report.STEP}, {layout}"
                    self.runner.add("step", what, timed, samples=n, tokens=tokens)
        if not rates:
            raise torch.OutOfMemoryError(f"a training step of {min(n, *BATCHES)} samples")
        _, layout, size = min(rates)
        batches = [LAYOUTS[layout](rows[i : i + size], self.device) for i in range(0, n, size)]
        run = partial(train, self.model, batches)
        timed = self.clock.measure(run, self.most_runs if len(batches) == 1 else 0)
        self.steps[n] = timed.seconds
        how = f"{layout}, {size} samples a batch"
        row = self.runner.add(
            "step",
            engines_report.STEP,
            timed,
            samples=n,
            tokens=tokens,
            step=timed.seconds,
            how=how,
        )
        self.note_trace(row, run)

    def run_of(self, job: Job, n: int) -> Callable[[], Any]:
        """The profile as a function to call."""
        forget, retain = self.data(n)
        return partial(
            gf.profile,
            self.model,
            None,
            forget=forget,
            retain=retain,
            objectives=job.objectives,
            reference_model=self.reference,
            **job.arguments,
        )

    def profile(self, job: Job, n: int) -> None:
        """Time a job, the first of several runs to warm up; trace quick jobs."""
        results: list[Any] = []
        run = self.run_of(job, n)
        few = n == self.sizes[0]
        timed = self.clock.measure(partial(keep, run, results), self.most_runs if few else 0)
        result = results.pop()
        differences = []
        for objective in set(COMPARED) & set(job.objectives):
            of_one = result.g_effect.sel(objective=objective, risk="unlearn")
            effects = of_one.sum([axis for axis in of_one.dims if axis != "sample"]).values[:n]
            other = self.effects.setdefault((n, objective), effects)
            if other is not effects:
                differences.append(relative(effects, other))
        row = self.runner.add(
            "engine",
            job.name,
            timed,
            samples=n,
            tokens=sum(len(row["labels"]) for rows in self.data(n) for row in rows),
            step=self.steps.get(n),
            difference=max(differences, default=""),
            how=f"{result.attrs['engine']} engine, {result.attrs['layout']}, "
            f"{result.attrs['token_budget']} tokens a batch",
        )
        if few:
            self.note_trace(row, run)

    def trace(self, row: Row, job: Job) -> None:
        """Trace a job that was timed."""
        self.note_trace(row, self.run_of(job, row["samples"]))

    def note_trace(self, row: Row, run: Callable[[], Any]) -> None:
        """Enter the counts of a trace into a row, and print the row again."""
        traced: Traced | None = self.clock.trace(run)
        if traced is None:
            return
        row["kernels"], row["waits"] = traced.kernels, traced.waits
        row["busy_percent"] = rounded(traced.busy_percent)
        self.runner.say(row)

    # ---- per-sample functions ----

    def beside(self, quantity: str, ids: Tensor, candidates: dict[str, Callable[[], Any]]) -> None:
        """Time the ways to a per-sample quantity; ours comes first, and the others must agree."""

        def backward() -> None:
            losses = sample_losses(self.model, ids)
            torch.autograd.grad(losses.mean(), list(self.model.parameters()))

        step = self.clock.measure(backward, self.most_runs)
        shared: dict[str, Any] = {"samples": len(ids), "tokens": ids.numel()}
        self.runner.add(
            "per sample", f"{quantity}: plain backward", step, step=step.seconds, **shared
        )
        ours: Tensor | None = None
        for name, candidate in candidates.items():
            found: list[Tensor] = []
            try:
                timed = self.clock.measure(
                    partial(keep, candidate, found),
                    self.most_runs if ours is None else min(self.most_runs, 1),
                )
            except Exception as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                self.runner.add("per sample", f"{quantity}: {name}", None, problem=said, **shared)
                self.runner.failed = self.runner.failed or ours is None
                self.clock.release()
                continue
            result = found.pop().double().cpu()
            self.runner.add(
                "per sample",
                f"{quantity}: {name}",
                timed,
                step=step.seconds,
                difference="" if ours is None else relative(result.numpy(), ours.numpy()),
                **shared,
            )
            ours = result if ours is None else ours
            self.clock.release()

    def random_ids(self, n: int) -> Tensor:
        """Tokens of `n` samples of one length."""
        generator = torch.Generator().manual_seed(n)
        ids = torch.randint(3, 8192, (n, self.per_sample[1]), generator=generator)
        return ids.to(self.device)

    def norms(self) -> None:
        """Gradient norms."""
        ids = self.random_ids(self.per_sample[0])
        ours = partial(gf.functional.per_sample_grad_norms, self.model, losses_of)
        self.beside(
            "norms",
            ids,
            {
                engines_report.OURS: partial(ours, {"input_ids": ids}),
                "loop": partial(loop_norms, self.model, ids),
                "vmap(grad)": partial(vmap_norms, self.model, ids),
            },
        )

    def direction(self) -> None:
        """Products with one direction."""
        ids = self.random_ids(self.per_sample[0])
        losses = sample_losses(self.model, self.random_ids(self.paired + 1))
        gradient = torch.autograd.grad(losses.mean(), list(self.model.parameters()))
        direction = dict(zip(dict(self.model.named_parameters()), gradient, strict=True))
        of = gf.functional.per_sample_inner_products
        self.beside(
            "direction",
            ids,
            {
                engines_report.OURS: partial(
                    of, self.model, losses_of, {"input_ids": ids}, direction
                ),
                "loop": partial(loop_direction, self.model, ids, direction),
                "vmap(grad)": partial(vmap_direction, self.model, ids, direction),
            },
        )

    def pairs(self) -> None:
        """Products of all pairs of a batch."""
        ids = self.random_ids(self.paired)
        batch = {"input_ids": ids}
        ours = partial(gf.functional.pairwise_inner_products, self.model, losses_of)
        self.beside(
            "pairs",
            ids,
            {
                engines_report.OURS: partial(ours, batch, batch),
                "loop": partial(loop_pairs, self.model, ids),
                "vmap(grad)": partial(vmap_pairs, self.model, ids),
            },
        )

    # ---- the published algorithm ----

    def published(self) -> None:
        """The sweep on the device and as released, from a micro-batch an objective."""
        n = self.sizes[0]
        batch, retain = (
            {
                key: value.to(self.device)
                for key, value in pad(rows[:MICRO_BATCH], self.padded).items()
            }
            for rows in self.data(n)
        )

        def timed(name: str, place: torch.device, names: set[str] | None) -> Timed:
            smoothed: dict[str, dict[str, Tensor]] = {}
            shared = (name, self.model, self.reference, batch, retain, smoothed, place, names)
            return self.clock.measure(lambda: published_micro_batch(*shared), 1)

        micro_batches = len(SWEPT) // len(SWEEP) * max(n // MICRO_BATCH, 1)
        scaled = f"{len(self.families)} micro-batches of {MICRO_BATCH}, x {micro_batches}"
        on_device = [timed(name, self.device, None) for name in self.families]
        self.add_published("kept on the device", on_device, 0, micro_batches, scaled)
        # The host's part takes tens of seconds a micro-batch, for any objective.
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        some = {name for name in sizes if ".layers.0." in name}
        share = sum(sizes[name] for name in some) / sum(sizes.values())
        bare = [timed(name, self.device, set()) for name in self.families]
        copied = timed(self.families[0], torch.device("cpu"), some)
        host = max(copied.seconds - bare[0].seconds, 0) / share
        how = f"{scaled}; copies to the host timed on {100 * share:.0f} % of the elements"
        self.add_published("as released", bare, host, micro_batches, how)

    def add_published(
        self, what: str, timed: Sequence[Timed], host: float, micro_batches: int, how: str
    ) -> None:
        """A row of the whole sweep, scaled."""
        n = self.sizes[0]
        seconds = micro_batches * sum(one.seconds + host for one in timed)
        whole = Timed(seconds, len(timed), max(one.peak_bytes for one in timed))
        name = f"published algorithm, 21 objectives, {what}"
        step = self.steps.get(n)
        self.runner.add("published", name, whole, samples=n, step=step, how=how)


def keep(run: Callable[[], Any], results: list[Any]) -> None:
    """Replace the result of the last run by a new one."""
    results[:] = [run()]


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The losses that the per-sample functions are given."""
    return sample_losses(model, batch["input_ids"])


def relative(found: np.ndarray, other: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(found - other).max() / np.abs(other).max())


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few samples")
    parser.add_argument("--budget", type=float, default=140, help="seconds for all parts")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a part")
    parser.add_argument("--out", type=Path, help="folder of the CSV")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write; return 1 where a part failed or results disagree."""
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; use --device cpu --tiny to try the script out")
    is_gpu = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if is_gpu else "cpu"
    folder = options.out or (RESULTS if is_gpu and not options.tiny else None)
    file = (
        folder / f"engines_{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.csv"
        if folder
        else None
    )
    versions = {"transformers": transformers.__version__}
    print(
        f"{gpu}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"commit {commit() or 'unknown'}"
    )
    runner = Runner(device, options.budget, options.limit)
    for what, part, least in Bench(runner, device, options.tiny).parts():
        runner.run(what, part, least)
        if file and runner.rows:
            write_csv(file, [row | versions for row in runner.rows])
    print(engines_report.report(runner.rows, runner.left_out))
    print(f"\n{runner.spent:.0f} s")
    if file:
        print(f"wrote {file}")
    return int(runner.failed)


if __name__ == "__main__":
    sys.exit(main())

"""The cost of update rules: time beside the passes needed, and OrthoGrad's memory by retain rows.

    python benchmarks/bench_updates.py            # about 10 minutes on two cores; writes
                                                  # benchmarks/results/updates_cpu.csv
    python benchmarks/bench_updates.py --quick    # a tiny model, prints only

An update is that of `geffect-fast unlearn` on `ga + nll`, without the optimizer's step. `passes`
are the passes that a rule needs at least, in forward-backwards over forget and over retain rows:
one of each, one more over the forget rows for SAM, half of one more over the retain rows for
OrthoGrad. `of_ideal` is the rule's time over the time of these passes, of which the plain update
has two. Updates take turns; the least of `--rounds` rounds counts, as noise only ever adds time.
Times are the processor's, of all threads.

OrthoGrad then runs with more and more retain rows, 8 of them a batch, once for each number: `extra`
is the rise of the peak of resident memory above that of the plain update on the same rows, in sizes
of the trainable parameters. Inputs and output gradients of a row that do not fit in memory wait in
a file. Beside a wider model they are smaller, so that a model of the widths of 1B parameters
follows the narrow one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama import make_model, random_rows
from machine import RESULTS, interleaved_minima, peak_extra_bytes, write_csv
from torch import nn

from geffect_fast.data import tokenize_rows
from geffect_fast.objectives import parse
from geffect_fast.training.loss import Draws, Loss
from geffect_fast.training.rule_losses import RuleLosses
from geffect_fast.training.trainer import UnlearnTrainer
from geffect_fast.training.trainer_arguments import training_arguments
from geffect_fast.unlearn_settings import Training
from geffect_fast.updates import Updater
from geffect_fast.updates import parse as parse_update

FORGET = 8
LENGTH = {"times": 48, "memory": 24}
"""Tokens of a row: about as many as in TOFU, and fewer where there are many rows."""
RULES = {
    "sgd": 2.0,
    "orthograd": 2.5,
    "gru": 2.0,
    "gu": 2.0,
    "blur": 2.0,
    "pcgrad": 2.0,
    "sago": 2.0,
    "sam": 3.0,
    "sam(penalty=0.1)": 3.0,
    "sam(curvature=0.1)": 5.0,
}
"""Rules with the fewest forward-backwards that they need, over forget and over retain rows."""
RETAIN = 8
ROOMS = ("orthograd", "orthograd(room=8)")
MEMORY = {
    ("27M", RETAIN): ROOMS,
    ("27M", 64): ROOMS,
    ("27M", 256): ROOMS[:1],
    ("135M", 64): ROOMS[:1],
}
"""Cases in which OrthoGrad's memory is measured: model and retain rows, with the rules."""
QUICK = 64
"""The most retain rows of a quick case, which is run twice. `--quick` runs no others."""


class Updates:
    """A model and its rows, updated by any rule."""

    def __init__(self, model: nn.Module, n_retain: int, length: int, folder: str) -> None:
        self.model = model
        of = {"forget": (FORGET, length, 0), "retain": (n_retain, length, 1)}
        sets = {name: tokenize_rows(random_rows(*to), None, name=name) for name, to in of.items()}
        self.rows = {name: range(len(each)) for name, each in sets.items()}
        loss = Loss(parse("ga + nll"), sets, FORGET * length, "packed", "token")
        draws = Draws({name: (len(each), len(each)) for name, each in sets.items()}, 9, seed=0)
        arguments = training_arguments(Training(steps=9), folder, torch.device("cpu"))
        self.trainer = UnlearnTrainer(model, arguments, loss=loss, draws=draws, reference=None)
        self.optimizer = self.trainer.create_optimizer()
        model.train()
        self.by_rule(Updater(parse_update("sgd"), model))
        self.optimizer.step()  # a state, for rules that read it
        self.losses().forget()
        model.zero_grad()

    def losses(self, told_apart: bool = False) -> RuleLosses:
        loss = self.trainer.loss
        return RuleLosses(self.trainer, self.model, self.rows, loss, None, told_apart=told_apart)

    def by_rule(self, updater: Updater) -> None:
        """One update."""
        told_apart = "retain_rows" in updater.rule.needs
        updater.update(self.losses(told_apart), self.optimizer)
        self.model.zero_grad()

    def over(self, which: str) -> None:
        """One forward and backward over the forget or the retain rows."""
        getattr(self.losses(), which)()
        self.model.zero_grad()


def times(model: nn.Module, rounds: int, folder: str) -> list[dict[str, Any]]:
    """A row for each rule: the time of an update of 8 forget and 8 retain rows."""
    updates = Updates(model, RETAIN, LENGTH["times"], folder)
    candidates = {
        name: partial(updates.by_rule, Updater(parse_update(name), model)) for name in RULES
    }
    seconds = interleaved_minima(candidates, rounds, time.process_time)
    # Forget and retain rows are equally many and of one length: the plain update is two equal
    # passes.
    one = seconds["sgd"] / 2
    return [
        {
            "rule": name,
            "parameters": "27M",
            "retain_rows": RETAIN,
            "passes": passes,
            "update_s": float(f"{seconds[name]:.4g}"),
            "ideal_s": float(f"{passes * one:.4g}"),
            "of_ideal": float(f"{seconds[name] / (passes * one):.3g}"),
            "extra": "",
        }
        for name, passes in RULES.items()
    ]


def memory(quick: bool, size: str, n_retain: int, folder: str) -> list[dict[str, Any]]:
    """Rows of OrthoGrad with `n_retain` retain rows, 8 of them a batch; run once each."""
    model = make_model(quick, size)
    updates = Updates(model, n_retain, LENGTH["memory"], folder)
    direction = sum(p.numel() * p.element_size() for p in model.parameters())
    warm = Updates(model, RETAIN, LENGTH["memory"], folder)
    warm.by_rule(Updater(parse_update(ROOMS[0]), model))  # the trial of rows runs once
    found = []
    for name in MEMORY[size, n_retain]:
        updater = Updater(parse_update(name), model)
        of_plain = peak_extra_bytes(partial(both, updates))
        seconds = interleaved_minima(
            {part: partial(updates.over, part) for part in ("forget", "retain")},
            1,
            time.process_time,
        )
        start = time.process_time()
        of_rule = peak_extra_bytes(partial(updates.by_rule, updater))
        took = time.process_time() - start
        if n_retain <= QUICK:  # the first run maps new memory, which matters for few rows
            start = time.process_time()
            updates.by_rule(updater)
            took = time.process_time() - start
        ideal = seconds["forget"] + 1.5 * seconds["retain"]
        found.append(
            {
                "rule": name,
                "parameters": size,
                "retain_rows": n_retain,
                "passes": 2.5,
                "update_s": float(f"{took:.4g}"),
                "ideal_s": float(f"{ideal:.4g}"),
                "of_ideal": float(f"{took / ideal:.3g}"),
                "extra": float(f"{(of_rule - of_plain) / direction:.3g}"),
            }
        )
    return found


def both(updates: Updates) -> None:
    """The plain update: gradients of both parts added up in place."""
    losses = updates.losses()
    losses.forget()
    losses.retain()
    updates.model.zero_grad()


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, prints only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []

    def keep(measured: list[dict[str, Any]]) -> None:
        for row in measured:
            found.append(row)
            extra = f"  {row['extra']:5.2f} directions more" if row["extra"] != "" else ""
            print(
                f"{row['rule']:20} {row['parameters']:>5} {row['retain_rows']:4} retain rows  "
                f"{row['update_s']:8.3f} s  "
                f"{row['of_ideal']:6.2f} of {row['passes']:.1f} passes{extra}",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        keep(times(make_model(args.quick), args.rounds, str(Path(folder) / "times")))
        for size, n in MEMORY:
            if not args.quick or n <= QUICK:
                keep(memory(args.quick, size, n, str(Path(folder) / f"{size}-{n}")))
    if not args.quick:
        path = RESULTS / "updates_cpu.csv"
        write_csv(path, found)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

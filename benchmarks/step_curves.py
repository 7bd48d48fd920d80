"""The G-effect over the steps of unlearning, four objectives on one model: curves and findings.

    python benchmarks/step_curves.py --tofu FOLDER --work DIR   # a small Llama trained on TOFU
    # the model of `geffect-fast demo`, of which docs/findings.md speaks
    python benchmarks/step_curves.py --demo DIR --work DIR2 --steps 30 --rate 5e-5

With `--tofu`, a Llama of `HIDDEN` x `LAYERS` first learns TOFU's full set (kept in `--work`, so
that it is trained once). Then it unlearns `forget05` with each objective, a probe a step on
`PROBED` rows of either set; every objective takes the same steps of the same optimizer at the same
rate. The curves go to `benchmarks/results/steps_*.csv`. `benchmarks/results/signs_*.csv` says how
often each prediction has the sign of the measured change. Tables and plots go to `compare/` in
`--work`.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import RESULTS, write_csv
from torch import nn

import geffect_fast as gf
from geffect_fast.data import SampleSet, make_batches, read_rows, tokenize_rows
from geffect_fast.demo import Size, make_model, recall, save, train_tokenizer
from geffect_fast.engines.model_outputs import model_outputs
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.report import write_report
from geffect_fast.report.summary.runs import write_comparison

OBJECTIVES = ("ga", "wga(alpha=5)", "npo(beta=0.1)", "ga + kl")
VOCABULARY, HIDDEN, LAYERS = 2048, 192, 4
EPOCHS, RATE, TOKENS = 14, 2e-3, 2048
PROBED = 40
DATA = {"tofu": ("forget05.json", "retain95.json"), "demo": ("forget.jsonl", "retain.jsonl")}


def learn(folder: Path, tofu: Path) -> None:
    """Train a Llama on TOFU's full set and save it, with its tokenizer, in `folder`."""
    rows = read_rows(tofu / "full.json", name="full")
    tokenizer = train_tokenizer([f"{r['question']} {r['answer']}" for r in rows], VOCABULARY)
    samples = list(tokenize_rows(rows, tokenizer, name="full").samples)
    torch.manual_seed(0)
    size = Size(vocab_size=VOCABULARY, hidden=HIDDEN, n_layers=LAYERS)
    model = make_model(tokenizer, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0)
    order = random.Random(0)
    for epoch in range(EPOCHS):
        order.shuffle(samples)
        batches = list(batches_of(SampleSet("full", tuple(samples))))
        losses = []
        for i, batch in enumerate(batches):
            share = (epoch + i / len(batches)) / EPOCHS
            rate = RATE * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = rate * min(1.0, share * EPOCHS)
            loss = -model_outputs(model, batch).token_logprob.sum() / batch.target_mask().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {sum(losses) / len(losses):.3f}", flush=True)
    for name in DATA["tofu"]:
        part = tokenize_rows(read_rows(tofu / name, name=name)[:200], tokenizer, name=name)
        probability, exact = recall(model, part)
        print(f"{name}: mean token probability {probability:.2f}, word for word {exact:.0%}")
    save(model, tokenizer, folder)


def batches_of(data: SampleSet) -> Iterator[Any]:
    """Packed batches of a set in its order."""
    yield from make_batches(data, ("answer",), token_budget=TOKENS)


def unlearn(model: Path, data: tuple[Path, Path], work: Path, steps: int, rate: float) -> Any:
    """Run every objective that has no run yet, and compare all runs."""
    runs = {}
    for objective in OBJECTIVES:
        folder = work / "".join(c if c.isalnum() else "-" for c in objective)
        if not (folder / "results.nc").exists():
            gf.unlearn(
                load_model(model),
                load_tokenizer(model),
                forget=str(data[0]),
                retain=str(data[1]),
                objective=objective,
                steps=steps,
                learning_rate=rate,
                probe_rows=PROBED,
                batch_size=32,
                out=folder,
                overwrite=folder.exists(),
                report=write_report,
            )
        runs[objective] = str(folder)
        print(f"{objective}: {folder}", flush=True)
    return gf.compare(runs)


PREDICTIONS = ("sgd", "step", "update")
"""Predictions of a change: by `-lr e`, by `-lr e_P`, and by the update itself."""


def signs(compared: Any) -> Iterator[dict[str, Any]]:
    """The share of steps, by run and risk, whose prediction has the sign of the measured change."""
    for run in compared["run"].values.tolist():
        for risk in compared["risk"].values.tolist():
            of = compared.sel(run=run, risk=risk)
            measured = of["measured_change"].values
            row: dict[str, Any] = {"objective": run, "risk": risk}
            for name in PREDICTIONS:
                predicted = of[f"predicted_{name}"].values
                both = np.isfinite(measured) & np.isfinite(predicted)
                right = np.sign(predicted[both]) == np.sign(measured[both])
                row["steps"] = int(both.sum())
                row[f"{name}_right"] = float(right.mean())
                row[f"{name}_r"] = float(np.corrcoef(predicted[both], measured[both])[0, 1])
            yield row


def main() -> None:
    """Train where there is no model yet, unlearn, and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tofu", type=Path, help="folder of TOFU's files")
    source.add_argument("--demo", type=Path, help="folder of a demo run")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    study = "tofu" if args.tofu else "demo"
    home = args.tofu or args.demo
    model = args.work / "model" if args.tofu else args.demo / "reference"
    if not (model / "config.json").exists():
        learn(model, args.tofu)
    compared = unlearn(
        model,
        tuple(home / name for name in DATA[study]),
        args.work,
        args.steps,
        args.rate,
    )
    folder = args.work / "compare"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_comparison(compared, folder)
    with (folder / "compare.csv").open(newline="") as file:
        write_csv(RESULTS / f"steps_{study}.csv", list(csv.DictReader(file)))
    write_csv(RESULTS / f"signs_{study}.csv", list(signs(compared)))


if __name__ == "__main__":
    main()

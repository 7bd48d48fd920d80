"""Shared parts of the studies on TOFU: rows, a small Llama that learns them, unlearning, tables."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from geffect_fast.arguments import checked_config
from geffect_fast.cli import main as geffect_fast
from geffect_fast.data import read_rows, tokenize_rows, write_jsonl
from geffect_fast.demo import Size, make_model, memorise, recall, save, train_tokenizer
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import UnlearnConfig

OF_TOFU = {
    "forget": "forget05_perturbed.json",
    "retain": "retain_perturbed.json",
    "holdout": "retain95.json",
}


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser of the options that every study has."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("tofu", type=Path, help="folder of TOFU's files")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--steps", type=int, default=10, help="updates of each unlearning")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of AdamW")
    parser.add_argument("--runs", type=int, help="number of runs, from the first on; default: all")
    parser.add_argument("--forget", type=int, default=60, help="rows to forget")
    parser.add_argument("--retain", type=int, default=140, help="rows to keep")
    parser.add_argument("--probed", type=int, default=30, help="rows of either set for effects")
    parser.add_argument("--holdout", type=int, default=40, help="rows of the hold-out")
    parser.add_argument("--hidden", type=int, default=128, help="width of the Llama")
    known = "share of the answers that the model learns word for word"
    parser.add_argument("--known", type=float, default=0.95, help=known)
    parser.add_argument("--csv", help="name of the tables in benchmarks/results")
    return parser


def prepared(args: argparse.Namespace) -> tuple[dict[str, Path], Path]:
    """The data files of a study by name, and the model that knows their rows."""
    args.work.mkdir(parents=True, exist_ok=True)
    files = choose_rows(args.tofu, args.work, args.holdout, args.forget, args.retain)
    model = args.work / "model"
    if not (model / "config.json").exists():
        size = Size(vocab_size=2048, hidden=args.hidden, known=args.known, max_epochs=200)
        learn(files, model, size)
    return files, model


def choose_rows(
    tofu: Path, work: Path, n: int, forget: int = 60, retain: int = 140
) -> dict[str, Path]:
    """Write the data sets of the study: rows to learn, and further rows to ask; by name.

    Args:
        tofu: folder of TOFU's files.
        work: folder that gets a file for each set.
        n: number of hold-out rows, which nothing is trained on.
        forget, retain: number of rows; TOFU has twenty of an author. About as many retain rows as
            forget rows are measured.
    """
    rows = {name: read_rows(tofu / file, name=name) for name, file in OF_TOFU.items()}
    rows |= {"forget": rows["forget"][:forget], "retain": rows["retain"][:retain]}
    learned = {row["question"] for name in ("forget", "retain") for row in rows[name]}
    strangers = [row for row in rows["holdout"] if row["question"] not in learned]
    rows["holdout"] = strangers[:: max(len(strangers) // n, 1)][:n]
    rows["asked"] = rows["retain"][:: max(retain // forget, 1)]
    files = {name: work / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        if not file.exists():
            write_jsonl(rows[name], file)
    return files


def learn(files: dict[str, Path], folder: Path, size: Size) -> None:
    """Train a Llama on forget and retain rows until it knows them, and save it."""
    rows = {name: read_rows(files[name], name=name) for name in ("forget", "retain")}
    texts = [f"{row['question']} {row['answer']}" for of in rows.values() for row in of]
    tokenizer = train_tokenizer(texts, size.vocab_size)
    sets = [tokenize_rows(of, tokenizer, name=name) for name, of in rows.items()]
    torch.manual_seed(0)
    model = make_model(tokenizer, size)
    epochs = memorise(model, sets, size, 0, progress=True)
    known = ", ".join(f"{recall(model, part)[0]:.3f}" for part in sets)
    print(f"known after {epochs} epochs; mean token probability {known}", flush=True)
    save(model, tokenizer, folder)


def unlearn(
    files: dict[str, Path], model: Path, out: Path, args: argparse.Namespace, **more: Any
) -> None:
    """Make one run in a folder that holds none yet, as `geffect-fast unlearn` makes it.

    The run has no report: `geffect-fast report RUN` writes one.
    """
    if (out / "results.nc").exists():
        return
    given = {
        "model": str(model),
        "forget": str(files["forget"]),
        "retain": str(files["retain"]),
        "steps": args.steps,
        "probe_every": max(args.steps // 2, 1),
        "probe_rows": args.probed,
        "learning_rate": args.rate,
        "resolve": ("sample",),
    }
    execute_unlearn(checked_config(UnlearnConfig, given | more), out, overwrite=True)


def folder_name(number: int, words: str) -> str:
    """The name of a run's folder, from its place in the study and its objective or rule."""
    return f"{number:02}-" + "".join(c if c.isalnum() else "-" for c in words).strip("-")


def run(*words: object) -> None:
    """Run a command of geffect-fast; end the script where the command fails."""
    if code := geffect_fast(list(map(str, words))):
        sys.exit(code)


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def write_tables(tables: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Write tables by name, with the machine's columns, to `benchmarks/results`."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from machine import RESULTS, write_csv

    for name, rows in tables.items():
        write_csv(RESULTS / f"{name}.csv", rows)

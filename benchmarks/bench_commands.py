"""Time and memory of commands that look at a run, by the number of rows of the run.

    python benchmarks/bench_commands.py            # writes benchmarks/results/commands_cpu.csv
    python benchmarks/bench_commands.py --quick    # 40 rows, one round, prints only

A run by row and token is made of a tiny model and of some number of forget rows, questions and
answers about invented authors. Every command then looks at the run in a process of its own, whose
start counts. Commands take turns; the least of `--rounds` rounds counts, as noise only ever adds
time. `cpu_s` is the processor's time of the same, which other programs change less. `peak_mib` is
the most memory of the process; runs of few and of many rows show whether it grows. `written_mib` is
the size of the written file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write_csv
from package_path import ROOT

from geffect_fast.data import write_jsonl
from geffect_fast.demo import Size, make_model, save, train_tokenizer
from geffect_fast.demo.authors import MAX_AUTHORS, make_fictitious_authors

ROWS = (1000, 4000)
RETAIN = 50
OBJECTIVES = "ga,npo(beta=0.1)"
MIB = 2**20

TIMED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, "-m", "geffect_fast", *sys.argv[1:]], stdout=-3)
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
sys.exit(done.returncode)
"""
"""Runs a command and prints the time and memory that it took. This process is small itself, as a
process inherits the peak of the one that starts it."""


def make_run(folder: Path, n: int) -> Path:
    """Make a run folder of `n` forget rows by token, and the inputs of the run."""
    rows: list[dict[str, Any]] = []
    while len(rows) < n + RETAIN:
        rows += make_fictitious_authors(MAX_AUTHORS, seed=len(rows))
    forget, retain = folder / "forget.jsonl", folder / "retain.jsonl"
    write_jsonl(rows[:n], forget)
    write_jsonl(rows[n : n + RETAIN], retain)
    tokenizer = train_tokenizer([row["question"] + row["answer"] for row in rows], 512)
    torch.manual_seed(0)
    save(make_model(tokenizer, Size(hidden=16, n_layers=2)), tokenizer, folder / "model")
    options = ["--forget", str(forget), "--retain", str(retain), "--objectives", OBJECTIVES]
    options += ["--engine", "forward", "--resolve", "sample,token"]
    run = folder / "run"
    command = ["profile", "--model", str(folder / "model"), *options, "--out", str(run)]
    timed([*command, "--quiet"])
    return run


def timed(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Seconds of a command, its processor time, and its most memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    seconds, processor, peak = json.loads(done.stdout)
    return seconds, processor, peak


def commands(run: Path) -> dict[str, tuple[list[str], Path | None]]:
    """The commands to time, by name: arguments, and the written file."""
    place, beside = str(run), run.parent
    csv, parquet = beside / "effects.csv", beside / "effects.parquet"
    return {
        "--help": (["--help"], None),
        "profile --help": (["profile", "--help"], None),
        "show": (["show", place], None),
        "tokens": (["tokens", place], None),
        "report": (["report", place], run / "report.html"),
        "export to CSV": (["export", place, "--to", str(csv), "--overwrite"], csv),
        "export to Parquet": (["export", place, "--to", str(parquet), "--overwrite"], parquet),
    }


def measure(n: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each command, on a run of `n` rows."""
    timed_commands = commands(make_run(folder, n))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in timed_commands}
    for _ in range(rounds):
        for name, (arguments, _) in timed_commands.items():
            found[name].append(timed(arguments))
    results_mib = (folder / "run" / "results.nc").stat().st_size / MIB
    return [
        {
            "command": name,
            "rows": n,
            "objectives": OBJECTIVES.count(",") + 1,
            "results_mib": round(results_mib, 2),
            "written_mib": "" if file is None else round(file.stat().st_size / MIB, 2),
            "rounds": rounds,
            "least_s": float(f"{min(each[0] for each in found[name]):.3g}"),
            "cpu_s": float(f"{min(each[1] for each in found[name]):.3g}"),
            "peak_mib": round(min(each[2] for each in found[name])),
        }
        for name, (_, file) in timed_commands.items()
    ]


def line(row: Mapping[str, Any]) -> str:
    """The printed line of a row."""
    written = f"  wrote {row['written_mib']} MiB" if row["written_mib"] else ""
    return (
        f"{row['rows']:5} rows  {row['command']:18} {row['least_s']:7.2f} s "
        f"({row['cpu_s']:.2f} s of the processor) "
        f"{row['peak_mib']:4} MiB{written}"
    )


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 rows, one round, prints only")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for n in (40,) if args.quick else ROWS:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(n, 1 if args.quick else args.rounds, Path(folder)):
                rows.append(row)
                print(line(row), flush=True)
    if not args.quick:
        path = RESULTS / "commands_cpu.csv"
        write_csv(path, rows)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

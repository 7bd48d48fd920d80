"""Check that a change of the code leaves every number as it was, to the bit, and old runs readable.

    python tools/same_results.py record OLD                with the old code: make a study, record
                                                           the commands' outputs and folders
    python tools/same_results.py record NEW --like OLD     with the new code: the same on that study
    python tools/same_results.py compare OLD NEW           print the differences, and exit with 1
    python tools/same_results.py read OLD                  with the new code: read the old runs and
                                                           print where the output differs

Numbers and names are compared exactly: in NetCDF files every variable, coordinate and attribute, in
printed text the numbers, as words may get better. Commands run on one thread.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

OBJECTIVES = "ga,npo(beta=0.5),wga(alpha=2),dpo(beta=0.3),rmu(layer=1),ga + 0.5*kl"
READS = "--model study/model --forget study/forget.jsonl --retain study/retain.jsonl"
EVERYTHING = "--reference study/reference --refusals study/refusals.txt"

MADE = {
    "profile": f"profile {READS} {EVERYTHING} --probe general=study/general.jsonl "
    f"--objectives '{OBJECTIVES}' --out runs/profile",
    "position": f"profile {READS} --objectives 'ga,npo(beta=0.5)' --reference study/reference "
    "--resolve group,sample,position --group first=0 --out runs/position",
    "token": f"profile {READS} {EVERYTHING} --objectives '{OBJECTIVES}' "
    "--resolve sample,token --out runs/token",
    "mean": f"profile {READS} --objectives ga,wga --reduction sample --resolve group --no-norms "
    "--out runs/mean",
    "sweep": f"sweep {READS} --reference study/reference "
    "--objectives 'npo(beta=0.1:2:4,log)' 'wga(alpha=1:3:3)' ga --out runs/sweep",
    "check": "check --model study/model --data study/forget.jsonl --samples 2 "
    f"--objectives 'ga,npo(beta=0.5)' {EVERYTHING}",
    "unlearn": f"unlearn {READS} --objective 'npo(beta=0.5) + 0.5*kl' --objectives ga --steps 4 "
    "--learning-rate 1e-3 --probe-rows all --keep-checkpoints --out runs/unlearn",
    "lora": f"unlearn {READS} --objective ga --steps 3 --learning-rate 1e-2 --probe-rows all "
    "--optimizer sgd --lora-rank 2 --batch-size 2 --out runs/lora",
    "checkpoints": "profile --checkpoints 'runs/unlearn/checkpoint-*' --forget study/forget.jsonl "
    "--retain study/retain.jsonl --tokenizer study/model --objectives ga,wga "
    "--out runs/checkpoints",
    "weights": "weights runs/token --retain-budget 0.5 --out runs/weights.jsonl",
}
"""Commands that compute, by name. The folder of a run has this name."""

READ = {
    "show": "show runs/profile",
    "show_steps": "show runs/unlearn",
    "tokens": "tokens runs/token --rows 1,retain:2",
    "export": "export runs/profile --to runs/profile.csv --overwrite",
    "compare": "compare runs/unlearn runs/lora --overwrite",
    "report": "report runs/profile --overwrite",
    "report_steps": "report runs/unlearn --overwrite",
}
"""Commands that read the files that the commands of `MADE` write."""

NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
VOLATILE = {"created", "versions"}
BY_PATH = {"checkpoints", "run_identity"}
"""Attributes of a profile of checkpoints that depend on the checkpoints' paths, and so on the
recording's folder."""


def run(name: str, command: str, folder: Path) -> None:
    """Run a command in a folder, and keep its output."""
    done = subprocess.run(
        [sys.executable, "-m", "geffect_fast.cli", *shlex.split(command)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{name}: exit code {done.returncode}")
    (folder / "printed").mkdir(exist_ok=True)
    printed = done.stdout.replace(f"{folder.resolve()}/", "")  # a folder's name may hold numbers
    (folder / "printed" / name).write_text(f"{done.returncode}\n{printed}", encoding="utf-8")
    if done.returncode:
        print(done.stderr)


def make_study(folder: Path) -> None:
    """Make a small Llama, another as its reference, a tokenizer and data, from one seed."""
    import torch

    from geffect_fast.data import write_jsonl
    from geffect_fast.demo import Size, make_model, save, train_tokenizer
    from geffect_fast.demo.authors import REFUSALS, make_fictitious_authors, split_forget

    folder.mkdir(parents=True)
    rows = make_fictitious_authors(2, seed=3)
    forget, retain = split_forget(rows, 0.5)
    for name, part in (("forget", forget[:4]), ("retain", retain[:5]), ("general", retain[5:8])):
        write_jsonl(part, folder / f"{name}.jsonl")
    (folder / "refusals.txt").write_text("\n".join(REFUSALS[:3]), encoding="utf-8")
    tokenizer = train_tokenizer([row["question"] + row["answer"] for row in rows], 320)
    for seed, name in ((1, "model"), (2, "reference")):
        torch.manual_seed(seed)
        save(make_model(tokenizer, Size(hidden=16, n_layers=3)), tokenizer, folder / name)


def differing_results(old: Path, new: Path) -> list[str]:
    """The differences of two NetCDF files: every variable, coordinate and attribute, to the bit."""
    import numpy as np
    import xarray as xr

    found = []
    with xr.open_dataset(old, engine="h5netcdf") as a, xr.open_dataset(new, engine="h5netcdf") as b:
        for name in sorted({*map(str, a.variables), *map(str, b.variables)}):
            if name not in a.variables or name not in b.variables:
                found.append(f"{name} is in one of them only")
                continue
            x, y = a.variables[name], b.variables[name]
            same = x.dims == y.dims and x.dtype == y.dtype and x.attrs == y.attrs
            if not (same and np.array_equal(x.values, y.values, equal_nan=x.dtype.kind == "f")):
                found.append(name)
        exempt = VOLATILE | (BY_PATH if "checkpoints" in old.parts else set())
        found += [
            f"attribute {name}: {a.attrs.get(name)!r}, {b.attrs.get(name)!r}"
            for name in sorted({*a.attrs, *b.attrs} - exempt)
            if str(a.attrs.get(name)) != str(b.attrs.get(name))
        ]
    return [f"{new}: {line}" for line in found]


def differing_numbers(old: Path, new: Path) -> list[str]:
    """The first line of two printed texts that holds other numbers."""
    numbers = [NUMBER.findall(path.read_text(encoding="utf-8")) for path in (old, new)]
    if numbers[0] == numbers[1]:
        return []
    for at, (x, y) in enumerate(zip(*numbers, strict=False)):
        if x != y:
            return [f"{new}: number {at} is {y}, was {x}"]
    return [f"{new}: {len(numbers[1])} numbers, were {len(numbers[0])}"]


def compare(old: Path, new: Path) -> list[str]:
    """The differences between two recordings."""
    found = []
    for path in sorted(old.glob("runs/**/*")):
        other = new / path.relative_to(old)
        if path.is_file() and "checkpoint-" not in str(path) and not other.exists():
            found.append(f"{other} is missing")
        elif path.suffix == ".nc":
            found += differing_results(path, other)
        elif path.suffix in {".csv", ".jsonl"} and path.read_bytes() != other.read_bytes():
            found.append(f"{other} differs")
    for path in sorted((old / "printed").iterdir()):
        found += differing_numbers(path, new / "printed" / path.name)
    return found


def main() -> int:
    """Record, compare or read; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--like", type=Path, help="a recording whose study to use")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    reading = commands.add_parser("read")
    reading.add_argument("old", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        given.folder.mkdir(parents=True)
        if given.like is None:
            make_study(given.folder / "study")
        else:
            shutil.copytree(given.like / "study", given.folder / "study")
        (given.folder / "runs").mkdir()
        for name, command in (MADE | READ).items():
            run(name, command, given.folder)
        return 0
    if given.command == "compare":
        found = compare(given.old, given.new)
    else:
        again = given.old.with_name(f"{given.old.name}-read")
        shutil.copytree(given.old, again)
        for name, command in READ.items():
            run(name, command, again)
        found = compare(given.old, again)
        shutil.rmtree(again)
    print(*found, f"{len(found)} differences", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

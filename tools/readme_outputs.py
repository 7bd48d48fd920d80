"""Make or check the outputs in README and the docs by the commands above them.

    python tools/readme_outputs.py            runs every command that shows an output, and puts
                                              the output in place
    python tools/readme_outputs.py --check    prints the differences, and exits with 1

Commands run as they are written, each in a process of its own, one after the other, README's first
and then those of the docs' pages in the order of mkdocs.yml. They run in a folder with invented
authors (`forget.jsonl`, `retain.jsonl`), a small Llama that learned them (`reference`), and the
same Llama a few steps of gradient ascent later (`model`). Training is in fp64, so that other
processors find the same model. Numbers are compared to `TOLERANCE`, words exactly.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.03
"""The largest relative difference, beside one unit of the last digit that is written."""

SHOWN = {
    "profile": ("^G-effect of", r"^$"),
    "sweep": ("the best of each family", r"^$"),
    "tokens": ("^forget row", r"^$"),
    "weights": ("^The best weights", r"^(?!The best weights|Of )"),
    "unlearn": ("^step 0", r"^(?!step|e_u is)"),
    "compare": ("runs? at the", r"^$"),
    "evaluate": ("^measures", r"^$"),
    "control": ("^share kept", r"^In brackets"),
    "relearn": ("^measures by step", r"^$"),
    "objectives": ("^Objectives", r"^$"),
    "check": ("^Covered", r"^(?!Covered|Tied|Exact|$)"),
}
"""For each command, patterns of the first line of its output that is shown, and of the first line
after it that is not. An empty line that follows a table's head does not count."""

NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """Commands in a page and the output below them.

    Attributes:
        first, last: lines of the output in the page, `last` exclusive.
        commands: the commands; the last one prints the output.
        shown: the output as the page has it.
    """

    first: int
    last: int
    commands: list[str]
    shown: list[str]


def pages() -> list[Path]:
    """README and the pages of docs/ that mkdocs.yml lists, in its order."""

    def files(nav: Any) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        else:
            for entry in nav.values() if isinstance(nav, dict) else nav:
                yield from files(entry)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    docs = [ROOT / "docs" / file for file in files(nav)]
    return [ROOT / "README.md", *(page for page in docs if page.exists())]


def blocks(lines: list[str]) -> Iterator[Block]:
    """Every indented block that begins with a prompt and holds an output after a line `...`."""
    at = 0
    while at < len(lines):
        if not lines[at].startswith("    $ geffect-fast"):
            at += 1
            continue
        commands: list[str] = []
        while lines[at].startswith("    $ ") or (commands and commands[-1].endswith("\\")):
            text = lines[at].strip().removeprefix("$ ")
            if commands and commands[-1].endswith("\\"):
                commands[-1] = commands[-1][:-1] + text
            else:
                commands.append(text)
            at += 1
        if lines[at] != "    ...":
            continue
        first = at = at + 1
        while lines[at].startswith("    ") or (not lines[at] and lines[at + 1].startswith("    ")):
            at += 1
        yield Block(first, at, commands, [line[4:] for line in lines[first:at]])


def shown_of(command: str, output: str) -> list[str]:
    """The part of a command's output that a page shows."""
    begin, end = SHOWN[command.split()[1]]
    lines = [line.rstrip() for line in output.splitlines()]
    start = next((i for i, line in enumerate(lines) if re.search(begin, line)), None)
    if start is None:
        raise SystemExit(f"error: {command} prints no line '{begin}':\n{output}")
    # the title of a table is followed by an empty line
    body = start + 2 if start + 1 < len(lines) and not lines[start + 1] else start + 1
    stop = next((i for i in range(body, len(lines)) if re.search(end, lines[i])), len(lines))
    while not lines[stop - 1]:
        stop -= 1
    return lines[start:stop]


def differences(written: list[str], found: list[str]) -> list[str]:
    """Lines that differ in words, or in a number by more than `TOLERANCE`."""
    if len(written) != len(found):
        return [f"{len(written)} lines are written, {len(found)} printed", *found]
    return [
        f"written  {old}\nprinted  {new}"
        for old, new in zip(written, found, strict=True)
        if not alike(old, new)
    ]


def alike(old: str, new: str) -> bool:
    """Whether two lines have the same words, and numbers within the tolerance."""

    def words(line: str) -> list[str]:
        return re.sub(r"─+", "─", NUMBER.sub("#", line)).split()

    def close(x: str, y: str) -> bool:
        a, b = (float(n.replace(",", "").replace("−", "-")) for n in (x, y))
        last = max(digit(x), digit(y))
        return abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + 1.01 * last

    numbers = [NUMBER.findall(line) for line in (old, new)]
    return words(old) == words(new) and all(map(close, *numbers))


def digit(number: str) -> float:
    """The value of one unit in the last written digit of a number."""
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(10.0 ** (int(exponent or 0) - decimals))


def prepare(folder: Path) -> None:
    """Make the data and models that the commands read."""
    import torch

    from geffect_fast import demo
    from geffect_fast.data import make_batches, tokenize_rows, write_jsonl
    from geffect_fast.demo.authors import make_fictitious_authors, split_forget

    rows = make_fictitious_authors(AUTHORS, 0)
    parts = dict(zip(("forget", "retain"), split_forget(rows, 0.4), strict=True))
    for name, part in parts.items():
        write_jsonl(part, folder / f"{name}.jsonl")
    tokenizer = demo.train_tokenizer([f"{r['question']} {r['answer']}" for r in rows], 512)
    torch.manual_seed(0)
    model = demo.make_model(tokenizer, demo.Size(hidden=48, n_layers=2)).double()

    def train(
        part: list[dict[str, str]], optimizer: torch.optim.Optimizer, sign: float, n: int
    ) -> None:
        sample_set = tokenize_rows(part, tokenizer, name="readme")
        batches = make_batches(sample_set, ("answer",), token_budget=256)
        for batch in batches * n:
            ids, places = batch.input_ids, batch.position_ids
            logits = model(input_ids=ids, position_ids=places, use_cache=False).logits[0]
            at = batch.target_index
            loss = torch.nn.functional.cross_entropy(logits[at], batch.targets[at].long())
            optimizer.zero_grad()
            (sign * loss).backward()
            optimizer.step()

    train(rows, torch.optim.Adam(model.parameters(), lr=4e-3), 1.0, EPOCHS)
    demo.save(model.float(), tokenizer, folder / "reference")
    descent = torch.optim.SGD(model.double().parameters(), lr=0.05)
    train(parts["forget"], descent, -1.0, ASCENTS)
    demo.save(model.float(), tokenizer, folder / "model")


AUTHORS, EPOCHS, ASCENTS = 6, 24, 3


IMPORTED = (
    "geffect_fast.demo",
    "geffect_fast.report.html.page",
    "geffect_fast.report.tables.steps",
    "geffect_fast.training.execute",
    "geffect_fast.training.trainer",
    "matplotlib.figure",
    "torch._decomp.decompositions_for_jvp",
    "transformers.models.llama.modeling_llama",
    "xarray.backends.h5netcdf_",
)
"""Modules that every command would take seconds to import."""


def forked(function: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Exit code and output, on both streams, of a function in a process of its own in a folder."""
    file = folder / ".output"

    def call() -> None:
        held = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(held, number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        os.chdir(folder)
        sys.exit(function())

    process = get_context("fork").Process(target=call)
    process.start()
    process.join()
    return process.exitcode or 0, file.read_text(encoding="utf-8")


def run(command: str, folder: Path) -> str:
    """The output of a command in the folder, on both streams."""
    from geffect_fast.cli import main

    words = shlex.split(command, comments=True)[1:]
    code, output = forked(lambda: main(words), folder)
    if code:
        raise SystemExit(f"error: {command} exits with {code}:\n{output}")
    return output


def main() -> int:
    """Make or compare the outputs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "NO_COLOR": "1"}
    for module in IMPORTED:  # once: commands are forks of this process
        import_module(module)
    number = wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, output = forked(lambda: prepare(folder), folder)
        if code:
            raise SystemExit(output)
        for page in pages():
            lines = page.read_text(encoding="utf-8").splitlines()
            found = [
                (block, shown_of(block.commands[-1], [run(c, folder) for c in block.commands][-1]))
                for block in blocks(lines)
            ]
            for block, printed in reversed(found):
                number += 1
                differing = differences(block.shown, printed)
                if not differing:
                    continue
                wrong += 1
                where = page.relative_to(ROOT)
                print(f"{where}: the output of {block.commands[-1]}", *differing, sep="\n")
                lines[block.first : block.last] = [f"    {line}".rstrip() for line in printed]
            if found and not given.check:
                page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = "are not what the commands print" if given.check else "were put in place"
    print(f"{wrong} of {number} outputs {said}")
    return int(given.check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

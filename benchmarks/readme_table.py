"""Rewrite the tables of README.md and of docs/speed.md, install.md, scaling.md from the CSVs.

python benchmarks/readme_table.py            # rewrites
python benchmarks/readme_table.py --check    # exit 1 where a page differs
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import engines_report
import gpu_report

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{p}.md" for p in ("speed", "install", "scaling")))
RESULTS = Path(__file__).parent / "results"
GPU_CODE = ("csrc", "geffect_fast/ops", "geffect_fast/capture", "geffect_fast/engines")
STEP = "training step"
SECONDS = ("compute_s", "communication_s", "seconds")
OF_BEST = "geffect_fast over the best other"
BEGIN, END = "<!-- {}: benchmarks/readme_table.py -->", "<!-- end of {} -->"


def read(name: str) -> list[dict[str, str]]:
    """The rows of a committed CSV."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def machine_line(row: dict[str, str]) -> str:
    """The machine of a measurement, as a line under a table."""
    return (
        f"{row['cpu']}, {row['threads']} thread(s), torch {row['torch']}, {row['date']}; "
        "ratios within one run."
    )


def sweep_table() -> str:
    """The sweep against the published algorithm."""
    rows = read("sweep_cpu.csv")
    lines = ["| what | against | theirs | ours | |", "|---|---|---:|---:|---|"]
    for row in rows:
        ratio = float(row["ratio"])
        lines.append(
            f"| {row['what']} | {row['baseline']} | {float(row['baseline_s']):,.1f} s "
            f"| {float(row['ours_s']):,.1f} s | **{ratio:.{1 if ratio < 10 else 0}f} x faster** |"
        )
    return "\n".join([*lines, "", machine_line(rows[0])])


def per_sample_table() -> str:
    """Every quantity and contestant as a multiple of the training step, the least in bold."""
    rows = read("per_sample_cpu.csv")
    names = [name for name in dict.fromkeys(r["contestant"] for r in rows) if name != STEP]
    lines = [
        f"| tokens | training step | multiples of it for | {' | '.join([*names, OF_BEST])} |",
        f"|---|---:|---|{'---:|' * (len(names) + 1)}",
    ]
    shapes = dict.fromkeys((r["samples"], r["length"]) for r in rows)
    for shape in shapes:
        here = [r for r in rows if (r["samples"], r["length"]) == shape]
        step = next(r for r in here if r["contestant"] == STEP)
        size, seconds = " x ".join(shape), f"{float(step['min_s']):.2f} s"
        for quantity in dict.fromkeys(r["quantity"] for r in here if r is not step):
            of = [r for r in here if r["quantity"] == quantity]
            times = {r["contestant"]: float(r["of_step"]) for r in of}
            cells = [f"{times[n]:.2f}" if n in times else "" for n in names]
            least = f"{min(times.values()):.2f}"
            said = [f"**{c}**" if c == least and len(times) > 1 else c for c in cells]
            paired = next((f"{float(r['of_best_peer']):.3f}" for r in of if r["of_best_peer"]), "")
            lines.append(f"| {size} | {seconds} | {quantity} | {' | '.join(said)} | {paired} |")
            size = seconds = ""
    return "\n".join([*lines, "", machine_line(rows[0])])


def forward_table() -> str:
    """The engines' times and memory by shape and number of objectives."""
    rows = read("forward_cpu.csv")
    runs = dict.fromkeys((r["contestant"], r["objectives"]) for r in rows)
    named = [name if name == STEP else f"{name.split()[0]}, {n}" for name, n in runs]
    lines = [f"| tokens | {' | '.join(named)} |", f"|---|{'---:|' * len(runs)}"]
    for shape in dict.fromkeys((r["samples"], r["length"]) for r in rows):
        cells = []
        for name, n in runs:
            row = next(
                r
                for r in rows
                if (r["samples"], r["length"]) == shape
                and (r["contestant"], r["objectives"]) == (name, n)
            )
            time = (
                f"{float(row['min_s']):.2f} s" if name == STEP else f"{float(row['of_step']):.2f}"
            )
            cells.append(f"{time}, {float(row['peak_extra_mb']):.0f} MB")
        lines.append(f"| {' x '.join(shape)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine_line(rows[0])])


def rules_table() -> str:
    """The forward pass without each one rule, as multiples of the pass with all of them."""
    rows = read("rules_cpu.csv")
    shapes = list(dict.fromkeys((r["samples"], r["length"]) for r in rows))
    lines = [
        f"| without the rule for | {' | '.join(' x '.join(shape) for shape in shapes)} |",
        f"|---|{'---:|' * len(shapes)}",
    ]
    for name in dict.fromkeys(r["left_out"] for r in rows if r["left_out"]):
        times = {(r["samples"], r["length"]): r["of_all"] for r in rows if r["left_out"] == name}
        cells = " | ".join(f"{float(times[shape]):.2f}" for shape in shapes)
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, "", machine_line(rows[0])])


def updates_table() -> str:
    """Update rules beside the passes they need, and OrthoGrad by its number of retain rows."""
    rows = read("updates_cpu.csv")
    lines = ["| update rule | forward-backwards needed | its time in those |", "|---|---:|---:|"]
    lines += [
        f"| `{r['rule']}` | {float(r['passes']):g} | {float(r['of_ideal']):.2f} |"
        for r in rows
        if not r["extra"]
    ]
    lines += [
        "",
        "| model | retain rows of an update | OrthoGrad | its time in 2.5 passes "
        "| memory beyond the plain update's |",
        "|---:|---:|---|---:|---:|",
    ]
    lines += [
        f"| {r['parameters']} | {r['retain_rows']} | `{r['rule']}` | {float(r['of_ideal']):.2f} "
        f"| {max(float(r['extra']), 0):.2f} x the parameters |"
        for r in rows
        if r["extra"]
    ]
    return "\n".join([*lines, "", machine_line(rows[0])])


def metrics_table() -> str:
    """The cost of metrics in training steps, in backwards of a row each, and in forwards."""
    rows = read("metrics_cpu.csv")
    lines = [
        f"| {rows[0]['rows']} rows, {rows[0]['tokens']} tokens | in training steps "
        "| in one backward a row | in forwards |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['contestant']} | {float(r['of_step']):.2f} | {float(r['of_by_row']):.2f} "
        f"| {float(r['of_forward']):.2f} |"
        for r in rows
    ]
    return "\n".join([*lines, "", machine_line(rows[0])])


def ops_table() -> str:
    """Every op against the fastest way to write it in plain torch, over all benchmarked shapes."""
    rows = read("ops_cpu.csv")
    kernels = {(r["op"], r["shape"]): r for r in rows if r["candidate"] == "kernel"}
    lines = [
        "| op | shapes | time of the fastest plain torch / ours | its most extra memory -> ours |",
        "|---|---:|---:|---:|",
    ]
    for op in dict.fromkeys(r["op"] for r in rows):
        shapes = [shape for o, shape in kernels if o == op]
        # `mm_alone` is only a part of the op.
        others = [r for r in rows if r["op"] == op and r["candidate"] not in ("kernel", "mm_alone")]
        fastest = [
            min((r for r in others if r["shape"] == shape), key=lambda r: float(r["ratio"]))
            for shape in shapes
        ]
        ratios = sorted(float(r["ratio"]) for r in fastest)
        theirs = max(float(r["peak_extra_mb"]) for r in fastest)
        ours = max(float(kernels[op, shape]["peak_extra_mb"]) for shape in shapes)
        lines.append(
            f"| `{op}` | {len(shapes)} | {ratios[0]:.2f} to {ratios[-1]:.2f} x, "
            f"median {statistics.median(ratios):.2f} x | {theirs:.1f} -> {ours:.1f} MB |"
        )
    return "\n".join([*lines, "", machine_line(rows[0])])


def ranks_table() -> str:
    """Data that ranks exchange, against the least they must, and the time beside one rank's."""
    rows = read("distributed_cpu.csv")
    lines = ["| | ranks | `--shard` | batches a rank | messages | sent | least | time |"]
    lines += ["|---|---:|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        sent, least = float(row["sent_mib"]), float(row["least_mib"])
        lines.append(
            f"| {row['what']} | {row['ranks']} | {row['sharding']} | {row['batches']} "
            f"| {row['messages']} "
            f"| {sent:,.0f} MiB | {least:,.0f} MiB | {float(row['against_one']):.2f} |"
        )
    return "\n".join([*lines, "", machine_line(rows[0])])


def scaling_table() -> str:
    """Times of profiles of large models: computed, and marked as computed on the page."""
    lines = ["| model | GPUs | `--shard` | memory a GPU | arithmetic | talking | together |"]
    lines += ["|---|---:|---|---:|---:|---:|---:|"]
    for row in read("scaling_computed.csv"):
        seconds = [f"{float(row[k]):.1f} s" if row[k] else "–" for k in SECONDS]
        held = f"{float(row['memory_gib']):.0f} GiB" + (
            "" if row["fits"] == "yes" else ", too much"
        )
        lines.append(
            f"| {row['model']} | {row['gpus']} | {row['sharding']} | {held} "
            f"| {' | '.join(seconds)} |"
        )
    return "\n".join(lines)


def matrix_table() -> str:
    """The Pythons and torches that the wheel was tried with."""
    rows = read("matrix.csv")
    lines = ["| Python | torch | system | version | outcome | |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['python']} | {r['torch']} | {r['system']} | {r['version']} | {r['outcome']} "
        f"| {r['date']} |"
        for r in rows
    ]
    return "\n".join(lines)


def has_changed(commit: str) -> bool | None:
    """Whether the code behind GPU figures differs from a commit; None if git does not know it."""
    command = ["git", "diff", "--quiet", commit, "--", *GPU_CODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return {0: False, 1: True}.get(done.returncode)


def since(commits: Collection[str]) -> str | None:
    """The remark on figures of these commits; None where git does not know one of them."""
    changed = [has_changed(commit) for commit in commits]
    if None in changed:
        return None
    named = " and ".join(sorted(commits))
    return f"Code of {named}" + ("; it has changed since." if any(changed) else ", as it is now.")


def gpu_tables(pattern: str, table: Callable[[list[dict[str, str]]], str]) -> str | None:
    """A table for every measured GPU; None where the code of a measurement is unknown."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        rows = read(path.name)
        said = since({row["commit"] for row in rows})
        if said is None:
            return None
        found.append(f"{table(rows)}\n\n{said} All of it: `benchmarks/results/{path.name}`.")
    return "\n\n".join(found)


def speed_table() -> str:
    """README's table: the sweep beside the published algorithm."""
    rows = read("sweep_cpu.csv")
    lines = [
        f"| {r['what']} | {r['samples']} | {float(r['ours_s']):,.1f} s "
        f"| {float(r['baseline_s']):,.0f} s | **{float(r['ratio']):.0f} x** |"
        for r in rows
        if r["baseline"] == "published algorithm"
    ]
    first = rows[0]
    return "\n".join(
        [
            "| what | samples | ours | published, scaled | |",
            "|---|---:|---:|---:|---|",
            *lines,
            "",
            f"A 27M Llama, {first['cpu']}, {first['threads']} threads, torch {first['torch']}, "
            f"{first['date']}.",
        ]
    )


def one_gpu_table(rows: list[dict[str, str]]) -> str:
    """Each op over all benchmarked shapes, and the device's best rates."""
    cases = gpu_report.by_case(rows)
    lines = [
        "| op | shapes | time of the fastest other way / ours | of the roofline, median |",
        "|---|---:|---:|---:|",
    ]
    for op in dict.fromkeys(op for op, _, _ in cases):
        of_op = [case for key, case in cases.items() if key[0] == op]
        found = [gpu_report.fastest_baseline(case) for case in of_op]
        ratios = sorted(ratio for ratio in found if ratio is not None)
        percent = statistics.median(float(c[gpu_report.OURS]["percent_of_roofline"]) for c in of_op)
        lines.append(
            f"| `{op}` | {len(of_op)} | {ratios[0]:.2f} to {ratios[-1]:.2f} x, "
            f"median {statistics.median(ratios):.2f} x | {percent:.0f} % |"
        )
    first = rows[0]
    return "\n".join(
        [
            *lines,
            "",
            f"{first['gpu']}, driver {first['driver']}, torch {first['torch']}, {first['date']}, "
            f"code of {first['commit']}; copy {first['copy_gb_per_s']} GB/s, "
            f"bf16 product {first['matmul_tflop_per_s']} TFLOP/s.",
        ]
    )


def tables() -> dict[str, str | None]:
    """Every table by its name; None where it cannot be made here."""
    return {
        "speed": speed_table(),
        "sweep": sweep_table(),
        "forward": forward_table(),
        "rules": rules_table(),
        "per sample": per_sample_table(),
        "updates": updates_table(),
        "metrics": metrics_table(),
        "ops": ops_table(),
        "matrix": matrix_table(),
        "ranks": ranks_table(),
        "scaling": scaling_table(),
        "gpu engines": gpu_tables("engines_nvidia-*.csv", engines_report.readme_table),
        "gpu": gpu_tables("nvidia-*.csv", one_gpu_table),
    }


def main() -> int:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not write, exit 1 on a difference")
    check = parser.parse_args().check
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = dict(before)
    for name, table in tables().items():
        begin, end = BEGIN.format(name), END.format(name)
        (page,) = [page for page, text in before.items() if begin in text]
        if table is not None:
            head, rest = after[page].split(begin)
            after[page] = f"{head}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    if check:
        return int(before != after)
    for page, text in after.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

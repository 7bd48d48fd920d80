"""Every op on a GPU: times, plain torch in comparison, and the share of the roofline.

    python benchmarks/bench_gpu.py              # writes benchmarks/results/<gpu>.csv and .png
    python benchmarks/bench_gpu.py --quick      # the most telling cases, prints only
    python benchmarks/bench_gpu.py --only ghost_norm --out /tmp/found
    python benchmarks/bench_gpu.py --device cpu --quick    # tiny sizes, to try the script out

`ours` is the op as it chooses its form, `ours:<form>` the same told which form to take by the
environment variables of csrc/cuda/choose.h; other candidates are plain torch, `mm_alone`
only the product that segment_bilinear cannot do without. `ratio` is a candidate's time over that of
`ours`. `gb_per_s` and `tflop_per_s` count the least bytes and operations that the result needs
(gpu_cases.py); `percent_of_roofline` is the least time that they take at the rates of a copy and of
matrix products, measured first, over the time taken. Times are medians on a cold cache
(gpu_timing.py). Every candidate's result is compared with that of `ours` before it is timed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_report
import torch
from gpu_cases import all_cases
from gpu_inputs import Candidate, Case, Maker
from gpu_timing import Ceilings, Measured, Timer
from machine import RESULTS, driver_version, write_csv
from torch import Tensor

from geffect_fast import ops

Row = dict[str, Any]
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 1e-3}
INPUT_SETS = 3
MOST_LEFT_OUT = 10  # shapes that are printed by name


class Budget:
    """A budget of seconds that begins at its creation."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def is_over(self) -> bool:
        """Whether no new case may begin."""
        return self.spent > self.seconds


class DeviceLost(Exception):
    """A kernel's failure after which nothing on the device works."""


class Disagreement(Exception):
    """Different results of two ways to compute an op."""


class Runner:
    """A runner of cases, one by one, which keeps their rows and the reasons for missing ones."""

    def __init__(self, timer: Timer, ceilings: Ceilings, budget: Budget) -> None:
        self.timer, self.ceilings, self.budget = timer, ceilings, budget
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self.left_out: list[str] = []
        self.failed = False

    def run(self, case: Case) -> list[Row]:
        """Check and time the candidates of a case, ours first; return their rows."""
        name = f"{case.op} {case.shape} {name_of(case.dtype)}"
        free = self.timer.free_bytes()
        if case.input_bytes > 0.5 * free:
            gib = 2 * case.input_bytes / 2**30
            self.problems.append(f"{name}: needs {gib:.0f} GiB of memory")
            return []
        n_sets = max(1, min(INPUT_SETS, int(0.2 * free / case.input_bytes)))
        inputs = [case.make(seed) for seed in range(n_sets)]
        expected: Any = None
        rows: list[Row] = []
        for provider, candidate in case.candidates.items():
            if self.budget.is_over:
                self.left_out.append(f"{name} {provider}")
                continue
            self.timer.free_bytes()  # frees the last candidate's memory
            try:
                with mock.patch.dict("os.environ", candidate.environment):
                    calls = prepared(candidate, inputs)
                    found = calls[0]()
                    if provider == gpu_report.OURS:
                        expected = found
                    elif provider not in gpu_report.PARTS:
                        check_alike(found, expected, TOLERANCE[case.dtype])
                    del found
                    measured = self.timer.measure(calls)
            except Exception as error:
                self._note(f"{name} {provider}", provider, error)
                if provider == gpu_report.OURS:
                    break
                continue
            ours = rows[0]["ms"] / 1e3 if rows else measured.seconds
            rows.append(self._row(case, provider, measured, ours))
            self.rows.append(rows[-1])
        return rows

    def _note(self, what: str, provider: str, error: Exception) -> None:
        """Keep an error; raise it where no other case can follow."""
        if isinstance(error, torch.OutOfMemoryError):
            self.problems.append(f"{what}: out of memory")
            return
        said = next(iter(str(error).strip().splitlines()), "")
        self.problems.append(f"{what}: {type(error).__name__}: {said}")
        # A baseline that torch cannot compile is a limit of torch.
        own = provider.startswith(gpu_report.OURS)
        self.failed = self.failed or own or isinstance(error, Disagreement)
        if "CUDA error" in str(error):
            self.failed = True
            raise DeviceLost(self.problems[-1]) from error

    def _row(self, case: Case, provider: str, measured: Measured, ours: float) -> Row:
        seconds, ceilings = measured.seconds, self.ceilings
        least = ceilings.seconds(case.n_bytes, case.flops, case.dtype)
        return {
            "op": case.op,
            "shape": case.shape,
            "dtype": name_of(case.dtype),
            "provider": provider,
            "ms": rounded(seconds * 1e3),
            "ratio": rounded(seconds / ours),
            "gb_per_s": rounded(case.n_bytes / seconds / 1e9),
            "tflop_per_s": rounded(case.flops / seconds / 1e12),
            "percent_of_roofline": rounded(100 * least / seconds),
            "peak_mb": rounded(measured.peak_extra_bytes / 2**20),
            "copy_gb_per_s": round(ceilings.copy / 1e9),
            "matmul_tflop_per_s": rounded(ceilings.low_precision / 1e12),
            "fp32_tflop_per_s": rounded(ceilings.fp32 / 1e12),
        }


def check_alike(found: Any, expected: Any, tolerance: float) -> None:
    """Compare results, each tensor in the Euclidean norm; NaN is a difference."""
    pairs = (
        [(found, expected)] if isinstance(expected, Tensor) else zip(found, expected, strict=True)
    )
    for x, y in pairs:
        difference = float((x.double() - y.double()).norm() / y.double().norm())
        if not difference <= tolerance:
            raise Disagreement(f"differs by {difference:.2g} from ours")


def prepared(candidate: Candidate, inputs: list[tuple[Any, ...]]) -> list[Any]:
    """A call for each set of inputs."""

    def bound(arguments: tuple[Any, ...]) -> Any:
        return lambda: candidate.run(*arguments)

    return [bound(candidate.prepare(*one)) for one in inputs]


def rounded(value: float) -> float:
    """A number rounded to four digits."""
    return float(f"{value:.4g}")


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def why_nothing_to_measure(device: torch.device) -> str | None:
    """Return the reason why kernels cannot be timed, None where they can."""
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU; use --device cpu to try the script out"
    missing = [
        row for row in ops.providers() if (row.device, row.provider) == ("cuda", "reference")
    ]
    return f"{missing[0].op} runs in plain torch: {missing[0].reason}" if missing else None


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the most telling cases")
    parser.add_argument("--only", default="", help="cases whose op and shape contain this text")
    parser.add_argument("--out", type=Path, help="folder of the CSV and the plot")
    budget = "seconds after which no new case begins"
    parser.add_argument("--budget", type=float, default=270, help=budget)
    parser.add_argument("--shrink", type=int, help="divide all sizes by this; 32 on the CPU")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write; return 1 where a kernel failed or candidates disagree."""
    options = arguments()
    device = torch.device(options.device)
    if (reason := why_nothing_to_measure(device)) is not None:
        sys.exit(f"error: {reason}")
    budget = Budget(options.budget)
    timer = Timer(device)
    ceilings = timer.ceilings()
    maker = Maker(device, options.shrink or (1 if timer.is_gpu else 32))
    name = torch.cuda.get_device_name(device) if timer.is_gpu else "cpu"
    driver = f"driver {driver_version()}, " if timer.is_gpu else ""
    title = f"{name}, {driver}torch {torch.__version__}"
    print(
        f"{title}: copy {ceilings.copy / 1e9:.0f} GB/s, bf16 product "
        f"{ceilings.low_precision / 1e12:.1f} TFLOP/s, fp32 {ceilings.fp32 / 1e12:.1f} TFLOP/s"
    )
    is_whole = timer.is_gpu and not (options.quick or options.only or options.shrink)
    folder = options.out or (RESULTS if is_whole else None)
    file = folder / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") if folder else None
    cases = [
        case
        for case in all_cases(maker)
        if options.only in f"{case.op} {case.shape}" and (not options.quick or case.priority == 0)
    ]
    runner = Runner(timer, ceilings, budget)
    for number, case in enumerate(cases, start=1):
        if budget.is_over:
            runner.left_out.append(f"{case.op} {case.shape} {name_of(case.dtype)}")
            continue
        try:
            rows = runner.run(case)
        except DeviceLost as error:
            print(f"error: nothing more can run on the device: {error}", file=sys.stderr)
            break
        if file and runner.rows:
            write_csv(file.with_suffix(".csv"), runner.rows)
        for key, found in gpu_report.by_case(rows).items():
            line = gpu_report.case_line(key, found)
            print(f"{number}/{len(cases)} {budget.spent:.0f} s {case.op:18s} {line}", flush=True)
    print(gpu_report.report(runner.rows, runner.problems))
    print(f"\n{budget.spent:.0f} s; left out for lack of time: {len(runner.left_out)}")
    for what in runner.left_out[:MOST_LEFT_OUT]:
        print(f"  {what}")
    if file and runner.rows:
        print(f"wrote {file.with_suffix('.csv')}")
        draw(runner.rows, title, file.with_suffix(".png"))
    return int(runner.failed)


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the plot, where matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    gpu_report.plot(rows, title, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())

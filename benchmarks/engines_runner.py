"""Parts of a benchmark within a time limit: their rows, failures, and omitted parts."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import engines_report
import torch
from engines_timing import Clock, OverTime, Timed, time_limit

START = time.monotonic()

Row = dict[str, Any]

TOLERANCE = 0.05
"""The largest difference of two ways in bf16. A larger one is a fault."""


class Runner:
    """A runner of parts, one by one, which keeps their rows.

    Args:
        device: the device that runs them.
        budget: seconds for all parts, counted from the import of this module.
        limit: seconds for a part.
    """

    def __init__(self, device: torch.device, budget: float, limit: float) -> None:
        self.clock, self.budget, self.limit = Clock(device), budget, limit
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.failed = False

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - START

    def run(self, name: str, part: Callable[[], None], least: float) -> None:
        """Run a part within the rest of the time; the part may fail."""
        left = min(self.limit, self.budget - self.spent)
        if left <= max(least, 0):
            self.left_out.append(name)
            return
        try:
            with time_limit(left):
                part()
        except OverTime as error:
            self.left_out.append(f"{name} ({error})")
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split())[:300]
            self.add("failed", name, None, problem=f"{type(error).__name__}: {said}")
            self.failed = True
        self.clock.release()

    def found(self, what: str, samples: int) -> Row | None:
        """The row of a job that was timed."""
        rows = (r for r in self.rows if (r["what"], r["samples"]) == (what, samples))
        return next((r for r in rows if r["seconds"]), None)

    def add(
        self,
        section: str,
        what: str,
        timed: Timed | None,
        *,
        samples: int | str = "",
        tokens: int | str = "",
        step: float | None = None,
        difference: float | str = "",
        how: str = "",
        problem: str = "",
    ) -> Row:
        """Keep a row and print it."""
        row = {
            "section": section,
            "what": what,
            "samples": samples,
            "tokens": tokens,
            "seconds": rounded(timed.seconds) if timed else "",
            "runs": timed.runs if timed else "",
            "of_step": rounded(timed.seconds / step) if timed and step else "",
            "kernels": "",
            "waits": "",
            "busy_percent": "",
            "peak_gib": rounded(timed.peak_bytes / 2**30) if timed else "",
            "difference": difference if difference == "" else rounded(float(difference)),
            "how": how,
            "problem": problem,
        }
        if difference != "" and not float(difference) <= TOLERANCE:
            row["problem"] = f"differs by more than {TOLERANCE}"
            self.failed = True
        self.rows.append(row)
        self.say(row)
        return row

    def say(self, row: Row) -> None:
        """Print a row as soon as it is known."""
        print(f"{self.spent:5.0f} s  {engines_report.row_line(row)}", flush=True)


def rounded(value: float) -> float:
    """A number rounded to four digits."""
    return float(f"{value:.4g}")

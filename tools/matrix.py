"""Try the wheel in dist/ with Pythons and torches, each pair in a fresh virtual environment.

    python tools/matrix.py --python python3.11 python3.12 --torch 2.13.0 2.14.0

benchmarks/results/matrix.csv gets a row as soon as a pair has ended, in place of an earlier row of
the same pair. `python benchmarks/readme_table.py` then puts the table into docs/install.md. pip
decides which build of a torch is installed: `PIP_FIND_LINKS` and `PIP_EXTRA_INDEX_URL` point pip to
small builds.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import tempfile
from datetime import datetime, timezone
from itertools import product
from pathlib import Path

from dist import DIST, ROOT, Failed, fresh, install, run, say, try_out, version

RESULTS = ROOT / "benchmarks" / "results" / "matrix.csv"
COLUMNS = ("python", "torch", "system", "version", "outcome", "date")
RELEASES = (
    "import platform, torch; print(platform.python_version(), torch.__version__.partition('+')[0])"
)


def tried(python: str, torch: str, wheel: Path) -> dict[str, str]:
    """A row: whether the wheel installs and runs; the error of a failure is printed."""
    row = {"python": python, "torch": torch, "version": version(), "outcome": "passed"}
    with tempfile.TemporaryDirectory() as name:
        try:
            found = fresh(Path(name), python, f"torch=={torch}", "numpy")
            row["python"], row["torch"] = run(found, "-c", RELEASES).split()
            install(found, wheel, f"torch=={torch}")
            try_out(found)
        except Failed as failed:
            row["outcome"] = "failed"
            print(failed, file=sys.stderr)
    row["system"] = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    row["date"] = datetime.now(timezone.utc).date().isoformat()
    return row


def write(rows: dict[tuple[str, str], dict[str, str]]) -> None:
    """Write the CSV, which is complete at any time, whenever the run is killed."""
    part = RESULTS.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[pair] for pair in sorted(rows))
    part.replace(RESULTS)


def main() -> int:
    """Try every pair, write each outcome, and exit with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", required=True, help="releases, such as 2.13.0")
    given = parser.parse_args()
    wheels = sorted(DIST.glob(f"geffect_fast-{version()}-*.whl"))
    if not wheels:
        print(f"error: no wheel of {version()} in dist/; run make dist", file=sys.stderr)
        return 2
    rows = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = {(row["python"], row["torch"]): row for row in csv.DictReader(file)}
    passed = True
    for python, torch in product(given.python, given.torch):
        say(f"{python} with torch {torch}")
        row = tried(python, torch, wheels[0])
        print(row["outcome"])
        passed = passed and row["outcome"] == "passed"
        rows[row["python"], row["torch"]] = row
        write(rows)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())

"""NVIDIA's compute-sanitizer finds no access out of bounds and no race in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from on_gpu import IS_GPU

CASE = Path(__file__).parent / "sanitizer_case.py"
TOOLS = ("memcheck", "racecheck")
SECONDS = 120


def find_sanitizer() -> str | None:
    """Return the compute-sanitizer of PATH, of CUDA_HOME or of the toolkit's usual place."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    places = [os.environ.get("PATH", ""), *map(str, folders)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(tool: str) -> list[str]:
    own = [sys.executable, str(CASE)]
    if not IS_GPU:
        return own
    return [str(find_sanitizer()), "--tool", tool, "--report-api-errors", "no", *own]


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Run all tools at once: each spends most of its time on one processor core."""
    if IS_GPU and find_sanitizer() is None:
        pytest.skip("compute-sanitizer is neither in PATH nor under CUDA_HOME")
    environment = {
        **os.environ,
        "PYTHONPATH": str(CASE.parents[2]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor ends at the end of its memory
    }
    if not IS_GPU:
        environment["DEVICE"] = "cpu"
    started = {
        tool: subprocess.Popen(
            command(tool),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in TOOLS
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_finds_nothing(tool: str, runs: dict[str, subprocess.Popen[str]]) -> None:
    try:
        said, _ = runs[tool].communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} has not ended after {SECONDS} s")
    finished = "every op has run" in said
    if IS_GPU and "SUMMARY" not in said:
        pytest.skip(f"{tool} cannot run here: {said.strip()[-300:]}")
    found = [int(n) for n in re.findall(r"SUMMARY: (\d+)", said)]
    errors = [int(n) for n in re.findall(r"\((\d+) errors?", said)] or found
    assert finished and not any(errors), said[-6000:]

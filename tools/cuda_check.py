"""Compile every CUDA kernel for every target, without a GPU, and print the resources of each.

    python tools/cuda_check.py                      # all files, all targets; `make cuda-check`
    python tools/cuda_check.py ghost_norm --target 9.0a

For each file, target and kernel the report holds registers, static shared memory, stack frame and
spills, as ptxas counts them. A table of registers follows. Warnings, spills and ptxas's "potential
performance loss" are errors. Reports are kept under build/cuda_check, named by the hash of all
their inputs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Loaded by path: on sys.path the package of this folder would hide an installed one.
_spec = spec_from_file_location("setup", ROOT / "setup.py")
assert _spec is not None and _spec.loader is not None
setup = module_from_spec(_spec)
_spec.loader.exec_module(setup)

BUILD = ROOT / "build/cuda_check"
NAME_LENGTH = 100
# Such as wgmma instructions that wait for each other; ptxas prints it as information.
PERFORMANCE_LOSS = r"Potential Performance Loss: .*"


class Kernel(NamedTuple):
    """The resources of one kernel on one target; in bytes, apart from registers."""

    name: str
    registers: int
    shared: int
    stack: int
    spills: int


class Job(NamedTuple):
    """A compilation of one file for one target; host code goes with one of a file's targets."""

    source: Path
    target: str
    with_host: bool


def parse_report(text: str) -> list[Kernel]:
    """Read the output of ptxas -v, in the order of the kernels; names are as in the output.

    A function that is called rather than inlined counts as a kernel of no registers, so that its
    spills are seen.
    """
    kernels = []
    for part in re.split(r"^ptxas info\s*: Function properties for ", text, flags=re.MULTILINE)[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part)
        if frame is None:
            raise ValueError(f"ptxas reports no stack frame: {part}")
        stack, stores, loads = map(int, frame.groups())
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(
            Kernel(
                part.split()[0],
                int(used[1]) if used else 0,
                int(shared[1]) if shared else 0,
                stack,
                stores + loads,
            )
        )
    return kernels


def short_names(symbols: list[str]) -> dict[str, str]:
    """Return a readable name for every symbol: no namespaces, no parameter list."""
    done = subprocess.run(
        ["c++filt", "--no-recurse-limit"],
        input="\n".join(symbols),
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        symbol: shorten(name)
        for symbol, name in zip(symbols, done.stdout.split("\n"), strict=False)
    }


def shorten(name: str) -> str:
    """Return a demangled function name without return type, namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("> >", ">>").removeprefix("void ")
    name = re.sub(r"\b(\w+::)+", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    if len(name) > NAME_LENGTH:
        # A kernel of CUTLASS: the instruction tells more than the rest of a page of types.
        instruction = re.search(r"MMA_\d\w+", name)
        tail = instruction[0] if instruction else hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: NAME_LENGTH // 2]}...{tail}"
    return name


def jobs_of(names: list[str], targets: list[str]) -> Iterator[Job]:
    """Yield the compilations to run: *_sm90.cu for sm_90a alone."""
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        if names and source.stem not in names:
            continue
        own = [t for t in targets if t == "9.0a" or not source.stem.endswith("_sm90")]
        for target in own:
            yield Job(source, target, with_host=target == own[0])


def nvcc_flags(job: Job) -> list[str]:
    """Return the flags of the build, with warnings as errors and with ptxas's report."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    includes = [Path(path) for path in include_paths()]
    if job.source.stem.endswith("_sm90"):
        includes.append(setup.cutlass_include())
    architecture = setup.sm_name(job.target).removeprefix("sm_")
    return [
        *COMMON_NVCC_FLAGS,
        *setup.NVCC_FLAGS,
        *setup.hopper_defines([setup.HOPPER_FLAG]),
        *setup.hopper_defines([setup.HOPPER_FLAG]),  # as in a build for all targets
        f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET_VERSION}",
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem={path}" for path in includes),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-Werror=all-warnings",
        "-Xptxas=-v",
        "-Xcompiler=-fPIC",
        "-c" if job.with_host else "-cubin",
    ]


def report_of(job: Job, nvcc: Path, common: bytes) -> str | None:
    """Return ptxas's report on a job, None where the file does not compile."""
    flags = nvcc_flags(job)
    digest = hashlib.sha256(common + str(flags).encode() + job.source.read_bytes()).hexdigest()[:16]
    name = f"{job.source.stem}-{setup.sm_name(job.target)}"
    kept = BUILD / f"{name}-{digest}.txt"
    if kept.exists():
        return kept.read_text()
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [nvcc, *flags, job.source, "-o", Path(scratch) / "object"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode != 0:
        print(f"{name} does not compile:\n{done.stdout}", file=sys.stderr)
        return None
    for old in BUILD.glob(f"{name}-*.txt"):
        old.unlink(missing_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(done.stdout)
    unfinished.replace(kept)
    return done.stdout


def common_hash(toolkit: Any) -> bytes:
    """Hash the inputs of all reports: nvcc, torch, CUTLASS, and the headers of csrc/."""
    compiler = subprocess.run(
        [toolkit.nvcc, "--version"], capture_output=True, text=True, check=True
    ).stdout
    digest = hashlib.sha256(f"{compiler}{version('torch')}{setup.cutlass_include()}".encode())
    for header in sorted([*ROOT.glob("csrc/*/*.h"), *ROOT.glob("csrc/*/*.cuh")]):
        digest.update(str(header.relative_to(ROOT)).encode() + header.read_bytes())
    return digest.digest()


def describe(kernel: Kernel, name: str) -> str:
    """Return one line on one kernel."""
    return (
        f"  {kernel.registers:3} registers {kernel.shared:6} B shared {kernel.stack:5} B stack"
        f" {kernel.spills:5} B spills  {name}"
    )


def table(rows: dict[tuple[str, str], dict[str, Kernel]], targets: list[str]) -> Iterator[str]:
    """Yield a table's lines: kernels by targets, with registers, and spill bytes in brackets."""
    yield " ".join(f"{setup.sm_name(target):>9}" for target in targets) + "  kernel"
    for (file, name), kernels in rows.items():
        cells = []
        for target in targets:
            kernel = kernels.get(target)
            spills = f" ({kernel.spills})" if kernel and kernel.spills else ""
            cells.append(f"{kernel.registers}{spills}" if kernel else "-")
        yield " ".join(f"{cell:>9}" for cell in cells) + f"  {file}: {name}"


def main(argv: list[str] | None = None) -> int:
    """Compile and report; return 0 where all compiles without warnings and spills."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="such as ghost_norm; or all")
    parser.add_argument("--target", action="append", choices=setup.CUDA_TARGETS, help="or all")
    parser.add_argument("--jobs", type=int, default=2, help="files compiled side by side")
    options = parser.parse_args(argv)
    toolkit = setup.find_toolkit()
    if toolkit is None:
        return _fail("nvcc was not found; install the CUDA 13 toolkit or set CUDA_HOME to it")
    targets = options.target or list(setup.CUDA_TARGETS)
    if unknown := [target for target in targets if target not in toolkit.targets()]:
        return _fail(
            f"nvcc of CUDA {toolkit.version} cannot compile for {', '.join(unknown)};"
            " install the CUDA 13 toolkit"
        )
    names = [Path(file).stem for file in options.files]
    jobs = list(jobs_of(names, targets))
    if not jobs:
        return _fail(f"no file of csrc/cuda is called {' or '.join(names)} for these targets")
    if setup.cutlass_include() is None and any(j.source.stem.endswith("_sm90") for j in jobs):
        return _fail(
            "no CUTLASS headers were found; pip install nvidia-cutlass, or set CUTLASS_PATH"
        )
    return check(jobs, toolkit, targets, options.jobs)


def check(jobs: list[Job], toolkit: Any, targets: list[str], side_by_side: int) -> int:
    """Run the compilations, print each as it ends, and return the exit code."""
    BUILD.mkdir(parents=True, exist_ok=True)
    common = common_hash(toolkit)
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    failures = []
    with ThreadPoolExecutor(side_by_side) as pool:
        reports = pool.map(lambda job: report_of(job, toolkit.nvcc, common), jobs)
        for job, report in zip(jobs, reports, strict=True):
            where = f"{job.source.name} {setup.sm_name(job.target)}"
            if report is None:
                failures.append(f"{where}: does not compile")
                continue
            print(where, flush=True)
            failures += [f"{where}: {loss}" for loss in re.findall(PERFORMANCE_LOSS, report)]
            kernels = parse_report(report)
            shown = short_names([kernel.name for kernel in kernels])
            for kernel in kernels:
                name = shown[kernel.name]
                print(describe(kernel, name), flush=True)
                rows.setdefault((job.source.stem, name), {})[job.target] = kernel
                if kernel.spills:
                    failures.append(f"{where}: {name} spills {kernel.spills} bytes")
    print()
    print("\n".join(table(rows, targets)))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

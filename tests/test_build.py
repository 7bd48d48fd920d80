"""The files that setup.py builds, their places, and the messages about missing tools."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from geffect_fast.ops import schema

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import cuda_check
import sanitizer_check

ROOT = cuda_check.ROOT
Describe = Callable[..., subprocess.CompletedProcess[str]]
CUDA_FILES = {path.stem for path in ROOT.glob("csrc/cuda/*.cu")}


def run_setup(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": "", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a build was refused."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    others = ("geffect-fast:", "W")  # notices, and warnings of torch
    lines = [line for line in done.stderr.splitlines() if not line.startswith(others)]
    assert len(lines) == 1, lines
    return lines[0]


RUN = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_setup_refuses_an_unknown_build() -> None:
    assert "auto, cpu, cuda, none" in refusal(run_setup(RUN, GEFFECT_FAST_BUILD="wrong"))


def test_every_file_of_the_package_is_built(tmp_path: Path) -> None:
    """Modules of all parts of the package, templates, style sheets and scripts."""
    # an earlier list of sources would be used instead of a search
    words = ["--quiet", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path]
    code = RUN.replace('"--version"', ", ".join(repr(str(word)) for word in words))
    done = run_setup(code, GEFFECT_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    package = ROOT / "geffect_fast"
    there = {
        path.relative_to(package)
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    lib = tmp_path / "geffect_fast"
    built = {path.relative_to(lib) for path in lib.rglob("*.*")}
    assert there - built == set()
    assert {"page.html.jinja", "tokens.js"} <= {path.name for path in built}


def test_files_that_makefile_and_docs_name_are_there() -> None:
    pages = [
        "Makefile",
        "README.md",
        "CONTRIBUTING.md",
        *(p.relative_to(ROOT) for p in ROOT.glob("docs/**/*.md")),
    ]
    folders = "tests|benchmarks|tools|docs|csrc|examples|geffect_fast"
    named = rf"\b(?:{folders})/[\w/]+\.(?:py|md|cpp|cuh?|h|csv)\b"
    gone = {
        (str(page), file)
        for page in pages
        for file in re.findall(named, (ROOT / page).read_text(encoding="utf-8"))
        if not (ROOT / file).exists()
    }
    assert not gone


def test_setup_without_native_build_needs_no_torch() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        + RUN
        + "print([name for name in sys.modules if name.startswith('torch.')])"
    )
    done = run_setup(code, GEFFECT_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


# A toolkit that lists its targets, and torch with CUDA or without. The extensions are printed
# instead of built.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-code) printf "sm_75\\nsm_80\\nsm_90\\nsm_121\\n" ;;
esac
"""
# This program is in PATH, and names the toolkit it belongs to.
SCRIPT = '#!/bin/sh\necho "#$ TOP={home}/bin/.." >&2\nexec {home}/bin/nvcc "$@"\n'
DESCRIBE = """
import json, runpy, setuptools, torch
torch.version.cuda = {cuda!r}
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
def describe(ext_modules=(), cmdclass=None, options=None):
    from torch.utils import cpp_extension
    built = {{e.name: vars(e) for e in ext_modules}}
    print(json.dumps({{"home": cpp_extension.CUDA_HOME, "wheel": options, **built}}))
setuptools.setup = describe
runpy.run_path("setup.py", run_name="__main__")
"""


# Each command is a fork of a process that has imported the slow modules.
PREPARED = """
import json, os, sys, traceback
import setuptools, torch.utils.cpp_extension
del sys.modules["torch.utils.cpp_extension"], torch.utils.cpp_extension  # it reads the environment
for line in sys.stdin:
    code, environment, *files = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(environment)
        for stream, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except SystemExit as refusal:
            print(refusal, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)  # without taking all that apart
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def prepared() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PREPARED]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        yield process


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A toolkit of CUDA 13.1 that knows sm_80 and sm_90 of our targets, beside CUTLASS headers."""
    home = (tmp_path / "cuda-13").resolve()
    write_script(home / "bin/nvcc", NVCC.format(version="13.1"))
    write_script(tmp_path / "path/nvcc", SCRIPT.format(home=home))
    header = tmp_path / "cutlass/include/cutlass/cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return home


@pytest.fixture
def describe(toolkit: Path, prepared: subprocess.Popen[str], tmp_path: Path) -> Describe:
    """The build that setup.py plans with this toolkit."""
    path = f"{toolkit.parent / 'path'}{os.pathsep}{os.environ['PATH']}"
    given = {
        "GEFFECT_FAST_BUILD": "cuda",
        "PATH": path,
        "CUDA_HOME": "",
        "CUDA_PATH": "",
        "CUTLASS_PATH": str(toolkit.parent / "cutlass"),
        "TORCH_CUDA_ARCH_LIST": "",
    }

    def run(cuda: str | None = "13.0", **environment: str) -> subprocess.CompletedProcess[str]:
        code = DESCRIBE.format(cuda=cuda)
        out, err = (Path(tempfile.mkstemp(dir=tmp_path)[1]) for _ in range(2))
        words = [code, {**os.environ, **given, **environment}, str(out), str(err)]
        print(json.dumps(words), file=prepared.stdin, flush=True)
        status = int(prepared.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    return run


def extensions(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def gencode(extension: dict) -> set[str]:
    flags = extension["extra_compile_args"]["nvcc"]
    return {flag.removeprefix("-gencode=") for flag in flags if flag.startswith("-gencode=")}


def stems(extension: dict, suffix: str) -> set[str]:
    return {Path(path).stem for path in extension["sources"] if path.endswith(suffix)}


def test_a_wheel_for_every_python_holds_nothing_that_is_bound_to_one(describe: Describe) -> None:
    built = extensions(describe(GEFFECT_FAST_BUILD="cpu", GEFFECT_FAST_ABI3="1"))
    assert set(built) - {"home", "wheel"} == {"geffect_fast._kernels"}
    assert built["wheel"] == {"bdist_wheel": {"py_limited_api": "cp310"}}
    assert extensions(describe(GEFFECT_FAST_BUILD="cpu"))["wheel"] == {}


@pytest.mark.parametrize("build", ["cuda", "auto"])
def test_cuda_build(toolkit: Path, describe: Describe, build: str) -> None:
    built = extensions(describe(GEFFECT_FAST_BUILD=build))
    assert built["home"] == str(toolkit)
    kernels, hopper = built["geffect_fast._kernels"], built["geffect_fast._kernels_sm90"]
    assert stems(kernels, ".cu") | stems(hopper, ".cu") == CUDA_FILES
    assert stems(hopper, ".cu") == {stem for stem in CUDA_FILES if stem.endswith("_sm90")}
    cpu = [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/common/*.cpp")]
    assert stems(kernels, ".cpp") == {path.stem for path in cpu}

    assert "-DGEFFECT_FAST_SM90A" in kernels["extra_compile_args"]["nvcc"]
    assert gencode(hopper) == {"arch=compute_90a,code=sm_90a"}
    assert gencode(kernels) == {"arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"}
    for extension in (kernels, hopper):
        assert {"-DUSE_CUDA", "-DNDEBUG", "-std=c++17"} < set(
            extension["extra_compile_args"]["nvcc"]
        )
        assert extension["py_limited_api"] is True
        assert "-Xcompiler=-fvisibility=hidden" in extension["extra_compile_args"]["nvcc"]
        assert "torch_python" not in extension["libraries"]
        assert "cudart" not in extension["libraries"]  # this toolkit has no libcudart.so
    assert str(toolkit.parent / "cutlass/include") in hopper["extra_compile_args"]["nvcc"]
    facts = dict(built["geffect_fast._C"]["define_macros"])
    assert facts["GEFFECT_FAST_CUDA_VERSION"] == '"13.1"'
    assert set(facts["GEFFECT_FAST_CUDA_ARCHITECTURES"].strip('"').split(",")) == {
        "sm_80",
        "sm_90a",
    }
    built_ops = facts["GEFFECT_FAST_CUDA_OPS"].strip('"').split(",")
    assert {"segment_bilinear", "segment_bilinear_terms_sm90"} < set(built_ops)
    assert set(built_ops) <= {*schema.SCHEMAS, *schema.INTERNAL_SCHEMAS}
    assert len(built_ops) >= len(CUDA_FILES)


def test_libcudart_of_the_toolkit_is_linked(toolkit: Path, describe: Describe) -> None:
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64/libcudart.so").touch()
    assert "cudart" in extensions(describe())["geffect_fast._kernels"]["libraries"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0"}, "9.0a is not in TORCH_CUDA_ARCH_LIST=8.0;9.0"),
        ({"CUTLASS_PATH": "/nowhere"}, "no CUTLASS headers were found"),
    ],
)
def test_hopper_kernels_are_left_out_with_a_notice(
    describe: Describe, environment: dict[str, str], said: str
) -> None:
    done = describe(**environment)
    built = extensions(done)
    assert f"the Hopper kernels are left out: {said}" in done.stderr
    assert "geffect_fast._kernels_sm90" not in built
    flags = built["geffect_fast._kernels"]["extra_compile_args"]["nvcc"]
    assert ("-DGEFFECT_FAST_SM90A" in flags) == ("TORCH_CUDA_ARCH_LIST" not in environment)
    assert stems(built["geffect_fast._kernels"], ".cu") == {
        stem for stem in CUDA_FILES if not stem.endswith("_sm90")
    }
    assert "_sm90" not in dict(built["geffect_fast._C"]["define_macros"])["GEFFECT_FAST_CUDA_OPS"]


def test_arch_list_is_honoured(describe: Describe) -> None:
    built = extensions(describe(TORCH_CUDA_ARCH_LIST="8.6 9.0 9.0a 12.0+PTX"))
    assert gencode(built["geffect_fast._kernels"]) == {
        "arch=compute_86,code=sm_86",
        "arch=compute_90a,code=sm_90a",  # serves the GPUs of sm_90
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    }


MISSING = [
    ({"cuda": None}, "torch .* is built without CUDA"),
    ({"CUDA_HOME": "/nowhere"}, "nvcc was not found .*CUDA 13 toolkit"),
    ({"cuda": "12.8"}, "is of CUDA 13.1 but torch of CUDA 12.8 .*CUDA 12 toolkit"),
]


@pytest.mark.parametrize(("given", "said"), MISSING)
def test_cuda_build_says_what_is_missing(describe: Describe, given: dict, said: str) -> None:
    line = refusal(describe(**given))
    assert re.fullmatch(f"GEFFECT_FAST_BUILD=cuda: .*{said}.*", line), line


def test_auto_build_goes_on_without_cuda(describe: Describe) -> None:
    done = describe(GEFFECT_FAST_BUILD="auto", cuda="12.8")
    built = extensions(done)
    assert "the CUDA kernels are left out" in done.stderr
    assert set(built) - {"home", "wheel"} <= {"geffect_fast._kernels", "geffect_fast._C"}
    assert not stems(built["geffect_fast._kernels"], ".cu")
    facts = dict(built["geffect_fast._C"]["define_macros"])
    assert facts["GEFFECT_FAST_CUDA_VERSION"] == facts["GEFFECT_FAST_CUDA_OPS"] == '""'


def test_unknown_gpu_is_refused_in_one_line(describe: Describe) -> None:
    line = refusal(describe(TORCH_CUDA_ARCH_LIST="Riesling"))
    assert "TORCH_CUDA_ARCH_LIST='Riesling'" in line


@pytest.mark.parametrize("build", ["cpu", "sanitize"])
def test_sanitizers_are_in_the_kernels_of_their_own_build_alone(
    describe: Describe, build: str
) -> None:
    built = extensions(describe(GEFFECT_FAST_BUILD=build, CUDA_HOME="/nowhere"))
    kernels, named = built["geffect_fast._kernels"], cuda_check.setup.SANITIZERS
    flags = kernels["extra_compile_args"]["cxx"]
    facts = dict(built["geffect_fast._C"]["define_macros"])
    assert facts["GEFFECT_FAST_FLAGS"] == f'"{" ".join(flags)}"'
    wanted = build == "sanitize"
    assert (named in flags) == (named in kernels["extra_link_args"]) == wanted
    # UBSan ignores overflows that -fwrapv, a flag of Python's own, defines.
    assert ("-fno-wrapv" in flags) == ("-fno-sanitize-recover=undefined" in flags) == wanted
    assert not stems(kernels, ".cu")  # and CUDA was not looked for


def test_sanitizers_that_miss_a_fault_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitizer_check.main() == 1
    monkeypatch.setattr(sanitizer_check, "FAULTS", {})
    assert sanitizer_check.main() == 1
    read, built = capsys.readouterr().err.splitlines()
    assert "miss a fault: a kernel was misled and 'AddressSanitizer" in read
    assert f"the kernels were built without {sanitizer_check.OVERFLOW}" in built


def test_cutlass_headers_may_be_given_either_way(
    toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("cutlass", "cutlass/include"):
        monkeypatch.setenv("CUTLASS_PATH", str(toolkit.parent / given))
        assert cuda_check.setup.cutlass_include() == toolkit.parent / "cutlass/include"

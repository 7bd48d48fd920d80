"""Builds the native kernels; everything else about the package is in pyproject.toml.

``GEFFECT_FAST_BUILD`` decides what is built, never the presence of a GPU:

    auto (default)  the C++ kernels if torch and a compiler are there, else pure Python; the CUDA
                    kernels too if torch has CUDA and its nvcc is there
    cpu             the C++ kernels, or an error
    cuda            the C++ and the CUDA kernels, or an error
    none            pure Python
    sanitize        the C++ kernels with AddressSanitizer and UBSan in them, for ``make sanitize``

``TORCH_CUDA_ARCH_LIST`` names the GPUs to build for, such as "8.0;9.0a"; ``CUDA_HOME`` the CUDA
toolkit; ``CUTLASS_PATH`` the CUTLASS headers where the package nvidia-cutlass is not installed;
``MAX_JOBS`` how many files are compiled at once. ``GEFFECT_FAST_ABI3=1`` makes a wheel that serves
Python 3.10 and every later one: without the module ``_C``, as pybind11 binds to one Python.

torch must be importable while building, so use ``pip install --no-build-isolation .``
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

CHOICES = ("auto", "cpu", "cuda", "none", "sanitize")
ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZERS = "-fsanitize=address,undefined"
SANITIZE_FLAGS = [
    "-O1",  # the last -O counts
    "-g",
    "-fno-omit-frame-pointer",
    SANITIZERS,
    "-fno-sanitize-recover=undefined",
    "-fno-wrapv",  # Python's own flags define overflows, so UBSan would ignore them
    "-D_GLIBCXX_ASSERTIONS",  # vector indices, which neither checks in allocated memory
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "--threads=2",
    "-DUSE_CUDA",
    "-DNDEBUG",  # an assert is a call, before which wgmma instructions must wait
    "-Xcompiler=-fvisibility=hidden",
]
# Used where nvcc knows them all and TORCH_CUDA_ARCH_LIST names no others.
CUDA_TARGETS = ("8.0", "8.9", "9.0a", "10.0", "12.0")
# The one target of *_sm90.cu, which use instructions that only sm_90a has.
HOPPER_FLAG = "-gencode=arch=compute_90a,code=sm_90a"
# One build serves torch 2.11 and every later 2.x.
TORCH_TARGET_VERSION = "0x020b000000000000"
# The module that pybind11 binds to one Python is left out, so that a wheel serves all of them.
ABI3 = os.environ.get("GEFFECT_FAST_ABI3") == "1"


def notice(message: str) -> None:
    """Say on stderr what is not built; pip shows stderr with -v."""
    print(f"geffect-fast: {message}", file=sys.stderr)


def cxx_compiler() -> str | None:
    """Return the C++ compiler that the extension build will call, None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def missing_for_native_build() -> str | None:
    """Return what keeps the C++ kernels from being built, None if nothing does."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in the build environment (pip install --no-build-isolation)"
    if cxx_compiler() is None:
        return "no C++ compiler was found (install g++ or set CXX)"
    return None


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, and nvcc's version such as 13.0."""

    home: Path
    version: str

    @property
    def nvcc(self) -> Path:
        """The path of the compiler."""
        return self.home / "bin" / "nvcc"

    def targets(self) -> list[str]:
        """Return the entries of CUDA_TARGETS that this nvcc can compile for."""
        listed = _output_of(self.nvcc, "--list-gpu-code").split()
        return [target for target in CUDA_TARGETS if sm_name(target).rstrip("a") in listed]


def sm_name(target: str) -> str:
    """Return the name of a target's machine code: "9.0a" is sm_90a."""
    return "sm_" + target.replace(".", "")


def _output_of(*command: str | Path) -> str:
    """Return the output of a command, "" where the command fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def find_toolkit() -> Toolkit | None:
    """Return the toolkit of CUDA_HOME or CUDA_PATH, else that of the nvcc in PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            return None
        # nvcc in PATH may be a link or a script elsewhere; nvcc itself names its toolkit.
        top = re.search(r"TOP=(.+)", _output_of(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))
        home = top[1] if top else str(Path(nvcc).resolve().parents[1])
    toolkit = Toolkit(Path(home).resolve(), "")
    release = re.search(r"release (\d+\.\d+)", _output_of(toolkit.nvcc, "--version"))
    return toolkit._replace(version=release[1]) if release else None


def missing_for_cuda_build(toolkit: Toolkit | None) -> str | None:
    """Return what keeps the CUDA kernels from being built, None if nothing does."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (install a build with CUDA)"
    major = torch.version.cuda.split(".")[0]
    if toolkit is None:
        return f"nvcc was not found (install the CUDA {major} toolkit, or set CUDA_HOME to it)"
    if toolkit.version.split(".")[0] != major:
        return (
            f"nvcc in {toolkit.home} is of CUDA {toolkit.version} but torch of CUDA"
            f" {torch.version.cuda} (set CUDA_HOME to a CUDA {major} toolkit)"
        )
    return None


def gencode_flags(toolkit: Toolkit) -> list[str]:
    """Return nvcc's flags for the GPUs to build for."""
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(toolkit.targets())
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError):
        sys.exit(
            f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']!r} names no GPU that torch"
            f" knows; use something like {';'.join(CUDA_TARGETS)}"
        )
    # Beside code for sm_90a, code for sm_90 would never be chosen.
    plain = HOPPER_FLAG.replace("90a", "90")
    return [flag for flag in flags if flag != plain or HOPPER_FLAG not in flags]


def hopper_defines(gencode: list[str]) -> list[str]:
    """Tell the host code that the kernels with instructions of sm_90a alone exist."""
    return ["-DGEFFECT_FAST_SM90A"] if HOPPER_FLAG in gencode else []


def cutlass_include() -> Path | None:
    """Return the folder of the CUTLASS headers: of CUTLASS_PATH, else of nvidia-cutlass."""
    if given := os.environ.get("CUTLASS_PATH"):
        folders = [Path(given), Path(given) / "include"]
    else:
        spec = importlib.util.find_spec("cutlass_library")
        folders = [Path(spec.origin).parent / "source/include"] if spec and spec.origin else []
    return next((folder for folder in folders if (folder / "cutlass/cutlass.h").exists()), None)


def missing_for_hopper(gencode: list[str]) -> str | None:
    """Return what keeps the Hopper kernels from being built, None if nothing does."""
    if HOPPER_FLAG not in gencode:
        return f"9.0a is not in TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']}"
    if cutlass_include() is None:
        return "no CUTLASS headers were found (pip install nvidia-cutlass, or set CUTLASS_PATH)"
    return None


def sources(pattern: str) -> list[str]:
    """Return files of csrc/; setuptools wants paths relative to the folder of setup.py."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


def ops_of(files: list[str]) -> str:
    """Return the operators that source files register, with commas between."""
    registration = re.compile(r'(?:\bm\.impl\("|^GEFFECT_FAST_REGISTER_CUDA\()(\w+)', re.MULTILINE)
    return ",".join(op for file in files for op in registration.findall((ROOT / file).read_text()))


def cxx_flags() -> list[str]:
    """Return the C++ compiler's flags for the operators."""
    sanitize = os.environ.get("GEFFECT_FAST_BUILD") == "sanitize"
    return [*CXX_FLAGS, *SANITIZE_FLAGS] if sanitize else CXX_FLAGS


def op_library(name: str, files: list[str], nvcc_flags: list[str] | None = None):
    """Describe a library of operators, with CUDA kernels where nvcc_flags are given.

    The library knows nothing of Python, so that it also builds where Python's own headers are not
    installed.
    """
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    kind = CppExtension if nvcc_flags is None else CUDAExtension
    library = kind(
        f"geffect_fast.{name}",
        files,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": cxx_flags(), "nvcc": nvcc_flags or []},
        extra_link_args=[flag for flag in cxx_flags() if flag == SANITIZERS],
        py_limited_api=True,
    )
    # Toolkits from PyPI lack the file that -lcudart asks for; torch brings its own libcudart.
    if nvcc_flags is not None and not any(
        (Path(folder) / "libcudart.so").exists() for folder in library.library_dirs
    ):
        library.libraries.remove("cudart")
    return library


def native_extensions(toolkit: Toolkit | None) -> list:
    """Describe what is built: the operators, and `_C`, a Python module that describes the build.

    The Hopper kernels are a library of their own, `_kernels_sm90`, for one target.
    """
    os.environ.setdefault("CXX", str(cxx_compiler()))
    from torch.utils.cpp_extension import CppExtension

    cpu, cuda, hopper = sources("cpu/*.cpp"), [], []
    gencode = [] if toolkit is None else gencode_flags(toolkit)
    if toolkit is not None:
        hopper = sources("cuda/*_sm90.cu")
        cuda = [file for file in sources("cuda/*.cu") if file not in hopper]
        if hopper and (missing := missing_for_hopper(gencode)):
            notice(f"the Hopper kernels are left out: {missing}")
            hopper = []
    extensions = [
        op_library(
            "_kernels",
            [*cpu, *cuda, *sources("common/*.cpp")],
            None if toolkit is None else [*NVCC_FLAGS, *gencode, *hopper_defines(gencode)],
        )
    ]
    if hopper:
        headers = ["-isystem", str(cutlass_include())]
        extensions.append(op_library("_kernels_sm90", hopper, [*NVCC_FLAGS, *headers, HOPPER_FLAG]))
    if ABI3:
        return extensions
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        notice("Python.h not found: kernels are built, geffect_fast._C.build_info() is not")
        return extensions
    facts = {
        "FLAGS": " ".join(cxx_flags()),
        "CUDA_VERSION": "" if toolkit is None else toolkit.version,
        "CUDA_ARCHITECTURES": ",".join(re.findall(r",code=(\w+)", " ".join(gencode))),
        "CPU_OPS": ops_of(cpu),
        "CUDA_OPS": ops_of([*cuda, *hopper]),
    }
    extensions.append(
        CppExtension(
            "geffect_fast._C",
            ["csrc/module.cpp"],
            define_macros=[(f"GEFFECT_FAST_{name}", f'"{fact}"') for name, fact in facts.items()],
            extra_compile_args=CXX_FLAGS,
        )
    )
    return extensions


def main() -> None:
    """Choose what to build and hand it to setuptools."""
    choice = os.environ.get("GEFFECT_FAST_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"GEFFECT_FAST_BUILD={choice!r} is unknown; use one of {', '.join(CHOICES)}")
    missing = None if choice == "none" else missing_for_native_build()
    if missing and choice in ("cpu", "cuda", "sanitize"):
        sys.exit(f"GEFFECT_FAST_BUILD={choice}: {missing}")
    if choice == "none" or missing:
        notice(f"pure Python, no native kernels: {missing or 'GEFFECT_FAST_BUILD=none'}")
        setup()
        return
    with_cuda = choice in ("auto", "cuda")
    toolkit = find_toolkit() if with_cuda else None
    if with_cuda and (missing := missing_for_cuda_build(toolkit)):
        if choice == "cuda":
            sys.exit(f"GEFFECT_FAST_BUILD=cuda: {missing}")
        notice(f"the CUDA kernels are left out: {missing}")
        toolkit = None
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # read once, by the next import
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=native_extensions(toolkit),
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
    )


if __name__ == "__main__":
    main()

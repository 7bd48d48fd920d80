"""Builds the native kernels; everything else about the package is in pyproject.toml.

``GEFFECT_FAST_BUILD`` decides what is built, never the presence of a GPU:

    auto (default)  the C++ kernels if torch and a compiler are there, else pure Python
    cpu             the C++ kernels, or an error
    cuda            an error in this version, which has no CUDA kernels
    none            pure Python

torch must be importable while building, so use ``pip install --no-build-isolation .``
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "cpu", "cuda", "none")
ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
# One build serves torch 2.11 and every later 2.x.
TORCH_TARGET_VERSION = "0x020b000000000000"


def notice(message: str) -> None:
    """Say on stderr what is not built; pip shows it with -v."""
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


def native_extensions() -> list:
    """Describe the two native libraries.

    ``_kernels`` holds the operators and knows nothing of Python, so it also builds where Python's
    own headers are not installed; ``_C`` is the Python module that describes the build.
    """
    os.environ.setdefault("CXX", str(cxx_compiler()))
    from torch.utils.cpp_extension import CppExtension

    # Compilation happens from the folder of setup.py, where setuptools wants relative paths.
    kernels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
    extensions = [
        CppExtension(
            "geffect_fast._kernels",
            [*kernels, "csrc/common/vec.cpp"],
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args=CXX_FLAGS,
            py_limited_api=True,
        )
    ]
    if (Path(sysconfig.get_path("include")) / "Python.h").exists():
        ops = ",".join(Path(path).stem for path in kernels)
        extensions.append(
            CppExtension(
                "geffect_fast._C",
                ["csrc/module.cpp"],
                define_macros=[
                    ("GEFFECT_FAST_FLAGS", f'"{" ".join(CXX_FLAGS)}"'),
                    ("GEFFECT_FAST_OPS", f'"{ops}"'),
                ],
                extra_compile_args=CXX_FLAGS,
            )
        )
    else:
        notice("Python.h not found: kernels are built, geffect_fast._C.build_info() is not")
    return extensions


def main() -> None:
    """Choose what to build and hand it to setuptools."""
    choice = os.environ.get("GEFFECT_FAST_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"GEFFECT_FAST_BUILD={choice!r} is unknown; use one of {', '.join(CHOICES)}")
    if choice == "cuda":
        sys.exit("GEFFECT_FAST_BUILD=cuda: this version has no CUDA kernels; use auto, cpu or none")
    missing = None if choice == "none" else missing_for_native_build()
    if missing and choice == "cpu":
        sys.exit(f"GEFFECT_FAST_BUILD=cpu: {missing}")
    if choice == "none" or missing:
        notice(f"pure Python, no native kernels: {missing or 'GEFFECT_FAST_BUILD=none'}")
        setup()
        return
    from torch.utils.cpp_extension import BuildExtension

    setup(ext_modules=native_extensions(), cmdclass={"build_ext": BuildExtension})


main()

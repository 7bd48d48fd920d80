"""`make cuda-check`: its reading of ptxas's report, and its failure on spills and warnings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import cuda_check
from cuda_check import Kernel, parse_report, setup, short_names, shorten, table

# From nvcc 13.0: a kernel that spills, one that does not, one that calls a function.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN12geffect_fast40_GLOBAL__N__4eebcfba_8_spill_cu_d48a280313greedy_kernelIfLi64EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN12geffect_fast40_GLOBAL__N__4eebcfba_8_spill_cu_d48a280313greedy_kernelIfLi64EEEvPT_
    64 bytes stack frame, 56 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 14.925 ms
ptxas info    : Compiling entry function '_ZN12geffect_fast40_GLOBAL__N__4eebcfba_8_spill_cu_d48a280313modest_kernelEPf' for 'sm_80'
ptxas info    : Function properties for _ZN12geffect_fast40_GLOBAL__N__4eebcfba_8_spill_cu_d48a280313modest_kernelEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 0.914 ms
ptxas info    : Compiling entry function '_Z5callsPfi' for 'sm_80'
ptxas info    : Function properties for _Z5callsPfi
    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 32 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 2.332 ms
ptxas info    : Function properties for _Z6helperfi
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
"""  # noqa: E501

KERNELS = """
namespace geffect_fast {{
namespace {{
template <class T, int kN>
__global__ void __launch_bounds__(1024, 2) greedy_kernel(T* x) {{
  T held[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kN; ++i) x[threadIdx.x * kN + i] = held[i] * held[kN - 1 - i];
}}
}}  // namespace
void launch(float* x) {{ {body} greedy_kernel<float, {n}><<<1, 64>>>(x); }}
}}  // namespace geffect_fast
"""


def test_report_is_read() -> None:
    kernels = parse_report(REPORT)
    shown = short_names([kernel.name for kernel in kernels])
    assert [kernel._replace(name=shown[kernel.name]) for kernel in kernels] == [
        Kernel("greedy_kernel<float, 64>", registers=32, shared=0, stack=64, spills=116),
        Kernel("modest_kernel", registers=12, shared=256, stack=0, spills=0),
        Kernel("calls", registers=10, shared=0, stack=32, spills=0),
        Kernel("helper", registers=0, shared=0, stack=0, spills=4),
    ]


def test_report_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="stack frame"):
        parse_report("ptxas info    : Function properties for kernel\n  something new\n")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void geffect_fast::(anonymous namespace)::sum_kernel<geffect_fast::Traits<c10::Half, "
            "8> >(geffect_fast::Matrix<float>, int (*)(int))",
            "sum_kernel<Traits<Half, 8>>",
        ),
        ("geffect_fast::tile<(geffect_fast::Contract)1>(int)", "tile<(Contract)1>"),
        (
            f"void gemm<{'tuple<int>, ' * 20}cute::MMA_Atom<cute::MMA_64x16_F32>>(A)",
            f"{'gemm<tuple<int>, tuple<int>, tuple<int>, tuple<int>, '[:50]}...MMA_64x16_F32",
        ),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert shorten(name) == short


def test_table_shows_registers_and_spills() -> None:
    spilling = Kernel("k", registers=255, shared=0, stack=8, spills=16)
    lines = list(table({("file", "k"): {"8.0": spilling}}, ["8.0", "9.0a"]))
    assert [line.split() for line in lines] == [
        ["sm_80", "sm_90a", "kernel"],
        ["255", "(16)", "-", "file:", "k"],
    ]


def test_hopper_files_have_one_target() -> None:
    jobs = list(cuda_check.jobs_of([], ["8.0", "9.0a"]))
    assert {job.target for job in jobs if job.source.stem.endswith("_sm90")} == {"9.0a"}
    assert {job.target for job in jobs if job.source.stem == "ghost_norm"} == {"8.0", "9.0a"}
    with_host = [job.source.stem for job in jobs if job.with_host]
    assert sorted(with_host) == sorted({job.source.stem for job in jobs})


def test_missing_compiler_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "find_toolkit", lambda: None)
    assert cuda_check.main([]) == 1
    assert capsys.readouterr().err.startswith("error: nvcc was not found")


@pytest.fixture
def check_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Check a file of made-up kernels."""
    if (toolkit := setup.find_toolkit()) is None:
        pytest.skip("no nvcc here")
    if "9.0a" not in toolkit.targets():
        pytest.skip("this nvcc does not know sm_90a")
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    monkeypatch.setattr(cuda_check, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_check, "BUILD", tmp_path / "build")

    def check(n: int, body: str = "") -> int:
        (tmp_path / "csrc/cuda/made_up.cu").write_text(KERNELS.format(n=n, body=body))
        return cuda_check.main(["--target", "9.0a"])

    return check


def test_kernels_that_fit_pass_and_are_compiled_once(
    check_kernels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_kernels(4) == 0
    first = capsys.readouterr().out
    assert "greedy_kernel<float, 4>" in first
    monkeypatch.delattr(cuda_check.tempfile, "TemporaryDirectory")  # the place of objects
    assert check_kernels(4) == 0
    assert capsys.readouterr().out == first


def test_spills_fail(check_kernels, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_kernels(64) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: made_up.cu sm_90a: greedy_kernel<float, 64> spills ")


def test_warnings_fail(check_kernels, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_kernels(4, body="int unused;") == 1
    assert "unused" in capsys.readouterr().err

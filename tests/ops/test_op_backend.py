"""The choice of the provider, and the messages about a missing one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from geffect_fast import ops
from geffect_fast.errors import InputError
from geffect_fast.ops import backend, schema

USE_AN_OP_TWICE = """
import torch
from geffect_fast import ops
x = torch.ones(2, 3)
for _ in range(2):
    ops.ghost_norm(x, x, torch.tensor([0, 2]))
print(ops.providers()[0])
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_native_build_serves_where_it_is_expected(request: pytest.FixtureRequest) -> None:
    if os.environ.get("GEFFECT_FAST_BUILD") not in ("cpu", "cuda"):
        pytest.skip("set GEFFECT_FAST_BUILD=cpu or cuda where a native build must be there")
    rows = [row for row in ops.providers() if row.device == "cpu"]
    assert {row.op for row in rows} == set(schema.SCHEMAS)
    files = (request.config.rootpath / "csrc/cpu").glob("*.cpp")
    kept = {file.stem for file in files} - set(schema.PART_SCHEMAS)
    assert {row.op for row in rows if row.provider == "cpu"} == kept


def test_providers_name_functions_and_not_their_parts() -> None:
    assert {row.op for row in ops.providers()} == set(schema.SCHEMAS) <= set(ops.__all__)


def test_build_info_agrees_with_the_providers() -> None:
    info = backend.build_info()
    if not info or backend.NATIVE_MISSING is not None:
        pytest.skip("no native build here")
    assert set(info) == {"compiler", "flags", "cuda_version", "architectures", "ops"}
    assert set(info["ops"]) == {"cpu", "cuda"}
    for device, ops_built in info["ops"].items():
        names = {*schema.SCHEMAS, *schema.INTERNAL_SCHEMAS}
        assert {op for op in names if backend.has_native(op, device)} == set(ops_built)
    has_cuda = info["cuda_version"] is not None
    assert has_cuda == bool(info["ops"]["cuda"])
    assert has_cuda == any(name.startswith("sm_") for name in info["architectures"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A build with CUDA kernels of every op, on a machine with an H100; no kernel runs."""
    monkeypatch.setattr(backend, "NATIVE_MISSING", None)
    monkeypatch.setattr(backend, "HOPPER_MISSING", None)
    monkeypatch.setattr(backend, "has_native", lambda op, device: True)
    monkeypatch.setattr(backend, "build_info", lambda: {"architectures": ["x86-64", "sm_90a"]})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    backend._gpu_missing.cache_clear()
    yield monkeypatch
    backend._gpu_missing.cache_clear()


def cuda_rows() -> list[backend.ProviderRow]:
    return [row for row in ops.providers() if row.device == "cuda"]


def test_cuda_kernels_serve(gpu: pytest.MonkeyPatch) -> None:
    assert {row.op: row.provider for row in cuda_rows()} == dict.fromkeys(schema.SCHEMAS, "cuda")
    assert all("float64" in row.reason for row in cuda_rows())
    assert not any("sm_90a" in row.reason for row in cuda_rows())


def test_missing_hopper_library_is_named_where_it_matters(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(backend, "HOPPER_MISSING", "not built")
    named = {row.op for row in cuda_rows() if "sm_90a: not built" in row.reason}
    assert named == {"segment_bilinear"}
    gpu.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    assert not any("not built" in row.reason for row in cuda_rows())


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        (backend, "NATIVE_MISSING", "GEFFECT_FAST_BUILD=none is set", "none is set"),
        (torch.version, "cuda", None, "torch .* is built without CUDA"),
        (backend, "has_native", lambda op, device: device == "cpu", "nvcc of CUDA 13.0"),
        (torch.cuda, "get_device_capability", lambda index=None: (8, 0), "LIST=8.0$"),
        (backend, "build_info", lambda: {"architectures": ["sm_80"]}, "LIST=9.0a$"),
    ],
)
def test_reason_why_no_cuda_kernel_serves(
    gpu: pytest.MonkeyPatch, where: Any, name: str, value: Any, said: str
) -> None:
    gpu.setattr(where, name, value)
    rows = cuda_rows()
    assert {row.provider for row in rows} == {"reference"}
    assert all(re.search(said, row.reason) for row in rows), rows[0]


@pytest.mark.parametrize(
    ("target", "runs", "not_on"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_89", [(8, 9)], [(8, 0), (9, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("compute_90", [(9, 0), (12, 0)], [(8, 9)]),
    ],
)
def test_gpus_that_code_runs_on(target: str, runs: list, not_on: list) -> None:
    assert all(backend._runs_on(target, *gpu) for gpu in runs)
    assert not any(backend._runs_on(target, *gpu) for gpu in not_on)


def test_reference_serves_what_cuda_kernels_decline(gpu: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for a GPU's: the test is of the provider that is called."""
    called = []
    gpu.setitem(schema.REFERENCES, "ghost_norm", lambda *args: called.append("ghost_norm"))
    gpu.setitem(schema.REFERENCES, "multi_tensor_gram", lambda *args: called.append("gram"))

    def call(dtype: torch.dtype) -> list[str]:
        called.clear()
        x, cu = torch.ones(2, 3, dtype=dtype), torch.tensor([0, 2])
        backend.call("ghost_norm", torch.device("cuda", 0), x, x, cu)
        backend.call("multi_tensor_gram", torch.device("cuda", 0), [x], 1, [0], 1)
        return called

    assert call(torch.float32) == []
    assert call(torch.float64) == ["ghost_norm", "gram"]
    gpu.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    backend._gpu_missing.cache_clear()
    assert call(torch.float32) == ["ghost_norm", "gram"]


def test_declined_call_refuses_autograd(gpu: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(InputError, match="requires grad"):
        backend.call("ghost_norm", torch.device("cuda", 0), x, x, torch.tensor([0, 2]))


def test_every_row_has_a_reason() -> None:
    assert all(row.reason for row in ops.providers())


def test_force_reference_ends_with_its_context() -> None:
    before = ops.providers()
    with ops.force_reference():
        assert {row.provider for row in ops.providers()} == {"reference"}
    assert ops.providers() == before


def test_missing_native_library_is_said_once() -> None:
    done = run_python(USE_AN_OP_TWICE, GEFFECT_FAST_BUILD="none")
    assert done.stderr.count("plain torch") == 1
    assert "GEFFECT_FAST_BUILD=none is set" in done.stderr
    assert "reference" in done.stdout


VALUES = """
import torch
from geffect_fast import ops

x = (torch.arange(270 * 533) * 37 % 101).reshape(270, 533) / 101 - 0.3
cu = torch.tensor([0, 1, 40, 143, 270])
found = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    y, g, w = x.to(dtype), x[:, 3:73].to(dtype), x[100:170].to(dtype)
    found += [ops.segment_dot(y, y, cu), ops.ghost_norm(y, y, cu), ops.ghost_norm(y, g, cu)]
    found += [ops.ghost_dot(y, g, cu, y, g, cu), ops.segment_bilinear(y, g, w, cu)]
values = [value for tensor in found for value in tensor.flatten().tolist()]
"""


def test_older_instructions_give_the_same_values() -> None:
    """Processors without AVX-512 run this code; `make sanitize` tests those without AVX2."""
    chosen: dict[str, Any] = {}
    exec(VALUES, chosen)
    older = run_python(VALUES + "print(*values)", ATEN_CPU_CAPABILITY="avx2").stdout.split()
    assert [float(value) for value in older] == pytest.approx(chosen["values"], rel=1e-5)

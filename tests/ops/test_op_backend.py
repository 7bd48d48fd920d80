"""Which provider serves, and what is said about a missing one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from geffect_fast import ops
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


def test_native_build_serves_where_it_is_expected() -> None:
    if os.environ.get("GEFFECT_FAST_BUILD") != "cpu":
        pytest.skip("set GEFFECT_FAST_BUILD=cpu where a native build must be there")
    rows = [row for row in ops.providers() if row.device == "cpu"]
    assert {row.op for row in rows} == set(schema.SCHEMAS)
    assert {row.op: row.provider for row in rows} == dict.fromkeys(schema.SCHEMAS, "cpu")


def test_build_info_agrees_with_the_providers() -> None:
    info = backend.build_info()
    if not info or backend.NATIVE_MISSING is not None:
        pytest.skip("no native build here")
    assert set(info) == {"compiler", "flags", "cuda_version", "architectures", "ops"}
    assert {op for op in schema.SCHEMAS if backend.has_native(op, "cpu")} == set(info["ops"])
    assert info["cuda_version"] is None


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


def test_baseline_instructions_give_the_same_values() -> None:
    """What a processor without AVX2 runs."""
    code = (
        "import torch\n"
        "from geffect_fast import ops\n"
        "x = torch.linspace(-3, 4, 70 * 33).reshape(70, 33)\n"
        "cu = torch.tensor([0, 1, 40, 70])\n"
        "for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "    y = x.to(dtype)\n"
        "    print(ops.segment_dot(y, y, cu).tolist(), ops.ghost_norm(y, y, cu).tolist())\n"
    )
    chosen, baseline = run_python(code), run_python(code, ATEN_CPU_CAPABILITY="default")
    for left, right in zip(numbers(chosen.stdout), numbers(baseline.stdout), strict=True):
        assert left == pytest.approx(right, rel=1e-6)


def numbers(text: str) -> list[float]:
    return [
        float(word) for word in text.replace("[", " ").replace("]", " ").replace(",", " ").split()
    ]


@pytest.mark.parametrize(
    ("value", "said"), [("wrong", "auto, cpu, cuda, none"), ("cuda", "no CUDA")]
)
def test_setup_refuses_a_build_it_cannot_make(value: str, said: str, request) -> None:
    setup = request.config.rootpath / "setup.py"
    done = subprocess.run(
        [sys.executable, str(setup), "--version"],
        env={**os.environ, "GEFFECT_FAST_BUILD": value},
        capture_output=True,
        text=True,
        cwd=setup.parent,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_setup_without_native_build_needs_no_torch(request) -> None:
    setup = request.config.rootpath / "setup.py"
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', '--version']\nrunpy.run_path({str(setup)!r})\n"
        "print([name for name in sys.modules if name.startswith('torch.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GEFFECT_FAST_BUILD": "none"},
        capture_output=True,
        text=True,
        cwd=setup.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")

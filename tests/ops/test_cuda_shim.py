"""The stand-in for CUDA in tests of kernels: its results, and the errors that it finds."""

from __future__ import annotations

import re
from collections.abc import Callable

import cuda_shim
import kernel_text
import pytest
import torch
from cuda_shim import FORWARD, REVERSE, SHUFFLED
from torch import Tensor

pytestmark = pytest.mark.slow

if (_reason := cuda_shim.why_missing()) is not None:
    pytest.skip(_reason, allow_module_level=True)

THREADS, LANES = 64, 32
X = torch.arange(1.0, THREADS + 1)
ORDERS = (FORWARD, REVERSE, SHUFFLED, 12345)

SIGNATURES = {
    "places": "(Tensor x)",
    "shuffles": "(Tensor x)",
    "votes": "(Tensor x)",
    "fragments": "(Tensor x, bool transpose)",
    "product": "(Tensor a, Tensor b)",
    "warpgroup": "(Tensor x, Tensor y, bool transpose)",
    "partial_copy": "(Tensor x, int bytes)",
    "reverse_as": "(Tensor x, int blocks, int threads, int bytes)",
    "statics": "(Tensor x, int bytes, bool raise_limit)",
    "grid_of": "(Tensor x, int x, int y, int z, int block_x, int block_z)",
    "bounds": "(Tensor x, int threads, bool with_bounds)",
}


@pytest.fixture(scope="module")
def run() -> Callable[..., Tensor]:
    """Call a kernel of selftest_*.cu by its name."""
    sources = sorted(cuda_shim.SHIM.glob("selftest_*.cu"))
    library = torch.library.Library("cuda_shim_selftest", "DEF")
    text = "".join(source.read_text() for source in sources)
    for name in re.findall(r'm\.impl\("(\w+)"', text):
        family = name.partition("_")[0]
        key = family if family in ("warpgroup", "statics") else name
        library.define(f"{name}{SIGNATURES.get(key, '(Tensor x)')} -> Tensor")
    cuda_shim.load("selftest", sources, "cuda_shim_selftest")

    def call(name: str, *args: object, order: int = FORWARD) -> Tensor:
        with cuda_shim.thread_order(order):
            return cuda_shim.call(f"cuda_shim_selftest::{name}", *args)

    call.library = library
    return call


# ---- results ----


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_of_every_block_runs_once(run, order: int) -> None:
    blocks, threads = torch.arange(12.0)[:, None], torch.arange(60.0)
    assert torch.equal(run("places", X, order=order), 100 * blocks + threads)


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_make_shared_memory_visible(run, order: int) -> None:
    assert torch.equal(run("reverse", X, order=order), X.flip(0))
    assert torch.equal(run("copied", X, order=order), X.flip(0))
    in_warp = X.reshape(2, LANES).flip(1).flatten()
    assert torch.equal(run("reverse_in_warp", X, order=order), in_warp)


def source_lane(kind: str, lane: int, argument: int, width: int) -> int:
    """The lane a shuffle reads, after CUDA's programming guide."""
    first = lane - lane % width
    if kind == "idx":
        return first + argument % width
    other = {"up": lane - argument, "down": lane + argument, "xor": lane ^ argument}[kind]
    inside = other >= first if kind == "up" else other < first + width
    return other if inside else lane


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_shuffles(run, dtype: torch.dtype) -> None:
    x = X.to(dtype) * (2**40 + 1 if dtype in (torch.int64, torch.float64) else 1)
    calls = [
        ("idx", None, 32), ("idx", 3, 8), ("up", 2, 32), ("up", 2, 8), ("down", 3, 32),
        ("down", 3, 16), ("xor", 21, 32), ("xor", 9, 8), ("xor", 7, 16),
    ]  # fmt: skip
    found = run("shuffles", x)
    for row, (kind, argument, width) in enumerate(calls):
        for t in range(THREADS):
            lane = t % LANES
            given = lane + 5 if argument is None else argument
            source = t - lane + source_lane(kind, lane, given, width)
            assert found[row, t] == x[source], (kind, argument, width, t)


@pytest.mark.parametrize("yes", [set(), {3}, {3, 40, 63}, set(range(32)), set(range(64))])
def test_votes(run, yes: set[int]) -> None:
    x = torch.tensor([1.0 if t in yes else -1.0 for t in range(THREADS)])
    found = run("votes", x)
    for warp in range(2):
        lanes = [t - LANES * warp for t in sorted(yes) if t // LANES == warp]
        expected = [
            len(lanes), lanes[0] + 1 if lanes else 0, bool(lanes), len(lanes) == LANES,
            len(yes), bool(yes), len(yes) == THREADS,
        ]  # fmt: skip
        of_warp = found[:, LANES * warp : LANES * (warp + 1)]
        assert torch.equal(of_warp, torch.tensor(expected).float()[:, None].expand(7, LANES))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_load_matrices(run, transpose: bool, order: int) -> None:
    matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    found = run("fragments", matrices.reshape(32, 8), transpose, order=order)
    for lane in range(LANES):
        for i in range(4):
            matrix = matrices[i].T if transpose else matrices[i]
            pair = matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert torch.equal(found[lane, i], pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_multiply_add(run, dtype: torch.dtype, order: int) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    torch.testing.assert_close(run("product", a, b, order=order), 1 + a.float() @ b.float())


def test_tensor_cores_cut_off(run) -> None:
    """Bits of terms behind the 25th binary place after the largest term's first are dropped."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[0, 0] = a[1, 0] = a[2, 0] = a[3, 0] = 1.0
    b[0] = 1.0
    a[0, 1:9], a[1, 1:9], a[2, 1:9], a[3, 1:9] = 2.0**-13, -(2.0**-13), 2.0**-12, -(2.0**-14)
    b[1:9] = 2.0**-12
    found = run("product", a.half(), b.half())[:4, 0].double() - 2
    # 1 + 1 and eight times +-2^-25, 2^-24, or -2^-26, which are dropped entirely
    assert found.tolist() == [2.0**-22, -(2.0**-22), 2.0**-21, 0.0]


def warpgroup_tiles(transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two operands and their product; `transpose`: rows are contracted."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.randn((64, 128) if transpose else (128, 64)).bfloat16()
    expected = x.float().T @ y.float() if transpose else x.float() @ y.float().T
    return x, y, expected


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_warpgroup_multiply_add(run, transpose: bool, order: int) -> None:
    x, y, expected = warpgroup_tiles(transpose)
    torch.testing.assert_close(run("warpgroup", x, y, transpose, order=order), expected)


@pytest.mark.parametrize("n_bytes", range(17))
def test_copy_fills_up_with_zeros(run, n_bytes: int) -> None:
    copied = torch.zeros(THREADS // 4, 16, dtype=torch.uint8)
    copied[:, :n_bytes] = X.view(torch.uint8).reshape(-1, 16)[:, :n_bytes]
    assert torch.equal(run("partial_copy", X, n_bytes), copied.flatten().view(torch.float32))


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing_barrier", X.flip(0)),
        ("missing_syncwarp", X.reshape(2, LANES).flip(1).flatten()),
        ("missing_commit", X.flip(0)),
        ("missing_wait", X.flip(0)),
        ("wait_for_too_few", X.flip(0)),
        ("missing_barrier_after_wait", X.flip(0)),
        ("copy_over_what_is_read", X.flip(0)),
    ],
)
def test_wrong_in_some_order(run, name: str, expected: Tensor) -> None:
    assert any(not torch.equal(run(name, X, order=order), expected) for order in ORDERS)


@pytest.mark.parametrize("left_out", ["barrier", "commit", "wait", "wait_before_copy"])
def test_warpgroup_product_is_wrong_without(run, left_out: str) -> None:
    def is_wrong(order: int) -> bool:
        x, y, expected = warpgroup_tiles(False)
        try:
            found = run(f"warpgroup_{left_out}", x, y, False, order=order)
        except RuntimeError as error:
            return "wgmma reads a copy before the fence" in str(error)
        return not torch.allclose(found, expected, rtol=1e-3, atol=1e-3)

    assert any(is_wrong(order) for order in ORDERS)


@pytest.mark.parametrize(
    ("left_out", "message"), [("fence", "before the fence"), ("begin", "without warpgroup_begin")]
)
def test_warpgroup_product_fails_without(run, left_out: str, message: str) -> None:
    x, y, _ = warpgroup_tiles(False)
    with pytest.raises(RuntimeError, match=message):
        run(f"warpgroup_{left_out}", x, y, False)


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cluster_share_memory(run, order: int) -> None:
    x = torch.randn(16, THREADS).bfloat16()
    found = run("cluster", x, order=order)
    assert torch.equal(found[:, :16], x.float().expand(2, -1, -1))
    sent = torch.arange(THREADS - 1.0, -1, -1)
    assert torch.equal(found[:, 16], torch.stack([100 + sent, sent]))


@pytest.mark.parametrize("left_out", ["wait", "expect"])
def test_copy_that_is_not_waited_for_is_nan(run, left_out: str) -> None:
    found = run(f"cluster_{left_out}", torch.ones(16, THREADS).bfloat16())
    assert bool(found[:, :16].isnan().any())


@pytest.mark.parametrize(
    ("left_out", "message"), [("init", "not initialised"), ("arrive", "others that never come")]
)
def test_barrier_fails_without(run, left_out: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(f"cluster_{left_out}", torch.ones(16, THREADS).bfloat16())


def test_order_decides_who_finds_a_value_missing(run) -> None:
    forward, reverse, shuffled = (run("missing_barrier", X, order=order) for order in ORDERS[:3])
    early = torch.arange(THREADS) < THREADS // 2
    assert torch.equal(forward.isnan(), early)
    assert torch.equal(reverse.isnan(), ~early)
    assert not torch.equal(shuffled.isnan(), early)
    assert not torch.equal(shuffled.isnan(), ~early)


def test_what_is_not_written_is_nan(run) -> None:
    assert torch.equal(run("unwritten_result", X).isnan(), torch.arange(THREADS) == 5)
    x, y, _ = warpgroup_tiles(False)
    assert bool(run("warpgroup_wait", x, y, False).isnan().all())


@pytest.mark.parametrize("name", ["unwritten_shared", "unwritten_static_shared"])
def test_shared_memory_starts_as_nan(run, name: str) -> None:
    for _ in range(2):
        assert bool(run("reverse", X).isfinite().all())
        assert bool(run(name, X).isnan().all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "never come: 24 threads have exited, 40 .* __syncthreads"),
        ("missing_lanes", "never come: 32 threads have exited, 32 .* __shfl_xor_sync"),
        ("barrier_or_shuffle", "never come: 32 threads wait in __shfl_xor.*, 32 .* __syncthreads"),
        ("mixed_collectives", "lanes of a warp meet in different collectives"),
        ("mixed_masks", "lanes of a warp meet in different collectives|never come"),
        ("foreign_lane", "reads a lane outside its mask"),
        ("lane_outside_mask", "__shfl_xor_sync by a lane outside of its mask"),
        ("shared_overrun", "shared memory is overrun: byte 256 of 256"),
        ("misaligned_copy", "cp.async with an address that is not a multiple of 16"),
        ("misaligned_copy_target", "cp.async with an address that is not a multiple of 16"),
        ("copy_from_shared", "cp.async from outside of global memory"),
        ("copy_from_local", "cp.async from outside of global memory"),
        ("copy_to_global", "cp.async to outside of shared memory"),
        ("misaligned_fragment", "ldmatrix from an address that is not a multiple of 16"),
        ("misaligned_vector", r"selftest_broken.cu:\d+: access to an address that is not aligned"),
        ("array_overrun", r"selftest_broken.cu:\d+: index outside of an array"),
        ("static_shared_overrun", r"selftest_broken.cu:\d+: index outside of an array"),
        ("wide_shift", r"selftest_broken.cu:\d+: shift by more bits"),
        ("read_behind", "thread .63,0,0.: access to an address outside of all"),
        ("read_before", "access to an address outside of all"),
        ("write_behind", "thread .63,0,0.: access to an address outside of all"),
        ("deep_stack", "more stack"),
    ],
)
def test_error_ends_the_launch(run, name: str, message: str, order: int) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(name, X, order=order)
    assert torch.equal(run("reverse", X, order=order), X.flip(0))


def test_host_must_not_touch_tensors(run) -> None:
    for _ in range(2):
        assert torch.equal(run("torch_calls", X), X)
        with pytest.raises(RuntimeError, match="host_read: the host's code touches memory of the"):
            run("host_read", X)


@pytest.mark.parametrize(
    ("blocks", "threads", "n_bytes", "message"),
    [
        (0, 64, 256, "invalid configuration argument: .* wrong grid size"),
        (1, 0, 256, "invalid configuration argument: .* wrong block size"),
        (1, 1025, 256, "invalid configuration argument: .* wrong block size"),
        (1, 64, 227 * 1024 + 1, "invalid argument: .* more shared memory than the device has"),
    ],
)
def test_impossible_launch(run, blocks: int, threads: int, n_bytes: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run("reverse_as", X, blocks, threads, n_bytes)


KIB = 1024
STATIC = "invalid argument: a launch with 1024 bytes of static and {} of dynamic shared memory"


def test_static_shared_memory_counts(run) -> None:
    """A KiB of static and 48 KiB of dynamic shared memory are more than a kernel is allowed."""
    for n_bytes in (48 * KIB, 47 * KIB + 1):
        with pytest.raises(RuntimeError, match=STATIC.format(n_bytes)):
            run("statics_1_kib", X, n_bytes, False)
    assert torch.equal(run("statics_1_kib", X, 47 * KIB, False), X.flip(0))
    assert torch.equal(run("statics_1_kib", X, 48 * KIB, True), X.flip(0))
    assert torch.equal(run("statics_1_kib", X, 226 * KIB, True), X.flip(0))
    with pytest.raises(RuntimeError, match="more shared memory than the device has"):
        run("statics_1_kib", X, 226 * KIB + 1, True)
    with pytest.raises(RuntimeError, match="50176 bytes of static"):
        run("statics_49_kib", X, 0, True)


@pytest.mark.parametrize(
    ("capability", "kib"),
    [((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)],
)
def test_shared_memory_is_that_of_the_capability(run, capability, kib: int) -> None:
    with cuda_shim.device(capability_major=capability[0], capability_minor=capability[1]):
        assert torch.equal(run("reverse_as", X, 1, THREADS, kib * KIB), X.flip(0))
        with pytest.raises(RuntimeError, match="more shared memory than the device has"):
            run("reverse_as", X, 1, THREADS, kib * KIB + 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 65535, 1, 32, 1), ""),
        ((1, 65536, 1, 32, 1), "wrong grid size"),
        ((1, 1, 65536, 32, 1), "wrong grid size"),
        ((1, 0, 1, 32, 1), "wrong grid size"),
        ((1, 1, 1, 1, 64), ""),
        ((1, 1, 1, 1, 65), "wrong block size"),
        ((1, 1, 1, 32, 33), "wrong block size"),
    ],
)
def test_limits_of_grids_and_blocks(run, shape: tuple[int, ...], message: str) -> None:
    if not message:
        assert torch.equal(run("grid_of", X, *shape), torch.ones(1))
        return
    with pytest.raises(RuntimeError, match=message):
        run("grid_of", X, *shape)


def test_launch_bounds(run) -> None:
    """Without bounds a compiler may give a thread 255 of a block's 64 K registers."""
    for threads, with_bounds, message in (
        (128, True, ""),
        (129, True, r"129 threads a block of a kernel with __launch_bounds__\(128\)"),
        (256, False, ""),
        (288, False, "288 threads a block of a kernel without __launch_bounds__"),
    ):
        if not message:
            assert torch.equal(run("bounds", X, threads, with_bounds), torch.ones(threads))
            continue
        with pytest.raises(RuntimeError, match=message):
            run("bounds", X, threads, with_bounds)


def test_parameters_of_a_kernel(run) -> None:
    assert torch.equal(run("parameters_fit", X), torch.zeros(THREADS))
    with pytest.raises(RuntimeError, match="a kernel with 32768 bytes of parameters"):
        run("parameters_too_large", X)


def test_kernels_reach_tensors_alone_on_one_stream(run) -> None:
    with pytest.raises(RuntimeError, match="a pointer to memory that the device cannot reach"):
        run("host_pointer", X)
    with pytest.raises(RuntimeError, match="another stream than torch's current one"):
        run("other_stream", X)


def test_instructions_need_their_device(run) -> None:
    x, y, _ = warpgroup_tiles(False)
    a, b = torch.ones(16, 16).half(), torch.ones(16, 8).half()
    for major, minor, refused in (
        (7, 5, {"cp.async", "mma"}),
        (8, 0, {"wgmma"}),
        (10, 0, {"wgmma"}),
    ):
        calls = {
            "cp.async": ("copied", X),
            "mma": ("product", a, b),
            "wgmma": ("warpgroup", x, y, False),
        }
        with cuda_shim.device(capability_major=major, capability_minor=minor):
            for instruction, call in calls.items():
                if instruction in refused:
                    with pytest.raises(
                        RuntimeError, match=f"{instruction}.*: no code for a device"
                    ):
                        run(*call)
                elif (major, instruction) != (7, "wgmma"):  # it begins with cp.async
                    run(*call)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("void f() { SHIM_SHARED static float x[4]; }", "of a function that is no kernel"),
        ("SHIM_KERNEL void k(int x) { if (x) {}", "nothing closes"),
    ],
)
def test_text_that_cannot_be_emulated(text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernel_text.rewritten(text)


def test_kernels_tell_their_launch_bounds() -> None:
    text = "SHIM_KERNEL void SHIM_LAUNCH_BOUNDS(f(2), 1) k(int (*x)(int)); SHIM_KERNEL void l() {}"
    assert kernel_text.rewritten(f"{text} int y;") == (
        " void  k(int (*x)(int));  void l() { ::cuda_shim::enter_kernel();} int y;"
    )
    text = "SHIM_KERNEL void SHIM_LAUNCH_BOUNDS(f(2), 1) k() { SHIM_SHARED int x; { } }"
    assert kernel_text.rewritten(text) == (
        " void  k() { ::cuda_shim::enter_kernel(f(2), 1);  int x; { } }"
    )


def test_device_can_be_chosen(run) -> None:
    n_bytes = 120 * 1024
    assert torch.equal(run("reverse_as", X, 3, THREADS, n_bytes), X.flip(0))
    with (
        cuda_shim.device(shared_memory=99 * 1024),
        pytest.raises(RuntimeError, match="more shared memory than the device has"),
    ):
        run("reverse_as", X, 3, THREADS, n_bytes)
    assert torch.equal(run("reverse_as", X, 3, THREADS, n_bytes), X.flip(0))
    with pytest.raises(ValueError, match="colour"), cuda_shim.device(colour=1):
        pass


@pytest.mark.parametrize("header", ["intrinsics.cuh", "warpgroup.cuh", "gemm.h"])
def test_every_function_is_emulated(header: str) -> None:
    """A kernel that uses a new function would not compile; this test says so first."""

    def functions(folder: str) -> set[str]:
        text = (cuda_shim.ROOT / folder / header).read_text()
        return set(re.findall(r"^(?:__device__|inline) [^;{]*?(\w+)\(", text, re.MULTILINE))

    real, emulated = functions("csrc/cuda"), functions("tests/cuda_shim/cuda")
    assert real and real - {"shared_address"} <= emulated

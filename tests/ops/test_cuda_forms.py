"""Every form of the CUDA ops gives the formula on every kind of device; the choice of the form."""

from __future__ import annotations

from functools import cache

import cuda_shim
import pytest
import torch
from op_providers import CUDA_SHIM
from op_samples import Maker, Sample
from test_op_values import assert_close_to_formula, has_tensor_cores, magnitude

pytestmark = pytest.mark.slow

if (_reason := cuda_shim.why_missing()) is not None:
    pytest.skip(_reason, allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AMPERE, HOPPER, BLACKWELL = 8, 9, 10
# Segments end within tiles, on their edges, or exceed a tile; empty segments lie between them.
LENGTHS = [130, 0, 64, 1, 60]
GHOST, BILINEAR = "GEFFECT_FAST_GHOST_FORM", "GEFFECT_FAST_BILINEAR_FORM"

FORMS = {
    "ghost_norm": (GHOST, ("gram", "gradient", "clusters", "")),
    "ghost_dot": (GHOST, ("",)),
    "segment_bilinear": (BILINEAR, ("fused", "cublas", "sm90", "gradient", "")),
}
NOT_OF_FP32 = {"ghost_norm": {"clusters"}, "segment_bilinear": {"fused", "cublas", "gradient"}}
"""Forms that fp32 replaces by another one, or takes by default."""


@cache
def samples(dtype: torch.dtype) -> dict[str, Sample]:
    make = Maker(dtype, seed=3)
    a, g, cu = make.rows(LENGTHS, 200, 136)
    other = make.rows([65, 100], 200, 136)
    odd = make.rows(LENGTHS, 131, 67)  # rows that do not begin on 16 bytes
    return {
        "norm": Sample("ghost_norm", "", (a, g, cu)),
        "norm, odd": Sample("ghost_norm", "", odd),
        "dot": Sample("ghost_dot", "", (a, g, cu, *other)),
        "dot, odd": Sample("ghost_dot", "", (*odd, *odd)),
        "one": Sample("segment_bilinear", "", (a, g, make(1, 136, 200), cu)),
        "three": Sample("segment_bilinear", "", (a, g, make(3, 136, 200), cu)),
        "per token": Sample("segment_bilinear", "", (a, g, make(2, 136, 200), cu), per_token=True),
        "transposed": Sample("segment_bilinear", "", (a, g, make(3, 200, 136).mT, cu)),
        "odd": Sample("segment_bilinear", "", (*odd[:2], make(2, 67, 131), odd[2])),
    }


def run(sample: Sample, capability: int) -> torch.Tensor:
    with cuda_shim.device(capability_major=capability), cuda_shim.serving():
        return sample.run()


def assert_right(sample: Sample, *found: torch.Tensor) -> None:
    tensor_cores = has_tensor_cores(CUDA_SHIM, sample.args[0].dtype)
    formula = sample.expected(), magnitude(sample)
    for one in found:
        assert_close_to_formula(sample, one, tensor_cores=tensor_cores, formula=formula)


# fp16 and bf16 share their code. fp32 needs neither tensor cores nor the capability. The host lays
# out transposed directions, for any form.
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [
        *((name, dtype, HOPPER) for name in samples(torch.float32) for dtype in DTYPES),
        *((n, torch.bfloat16, AMPERE) for n in samples(torch.float32) if n != "transposed"),
    ],
    ids=str,
)
def test_every_form_gives_the_formula(
    name: str, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = samples(dtype)[name]
    variable, forms = FORMS[sample.op]
    if dtype == torch.float32:
        forms = [form for form in forms if form not in NOT_OF_FP32.get(sample.op, ())]
    found = []
    for form in forms:
        monkeypatch.setenv(variable, form)
        found.append(run(sample, capability))
        if dtype != torch.float16:
            with cuda_shim.thread_order(cuda_shim.SHUFFLED):
                assert torch.equal(run(sample, capability), found[-1]), form
    assert_right(sample, *found)


@pytest.mark.parametrize(("op", "variable"), [("one", BILINEAR), ("norm", GHOST)])
def test_unknown_form_is_an_error(op: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "fastest")
    with pytest.raises(RuntimeError, match=f"{variable} must be"):
        run(samples(torch.bfloat16)[op], HOPPER)


def rows(lengths: list[int], d_in: int, d_out: int) -> tuple[torch.Tensor, ...]:
    return Maker(torch.bfloat16).rows(lengths, d_in, d_out)


def directions(count: int, d_out: int, d_in: int) -> torch.Tensor:
    return Maker(torch.bfloat16, seed=1)(count, d_out, d_in)


CHOICES = [
    # several directions share a product where segments fill their slabs of tokens
    ("long, 2 directions", AMPERE, [130, 140], 2, "gradient"),
    ("short, 2 directions", AMPERE, [20, 9, 30], 2, "fused"),
    ("1 direction", AMPERE, [130, 140], 1, "fused"),
    # without the library for sm_90a, and with instructions that only cuBLAS uses
    ("long, 2 directions", HOPPER, [130, 140], 2, "cublas"),
    ("1 direction", HOPPER, [130, 140], 1, "cublas"),
    ("1 direction", BLACKWELL, [130, 140], 1, "cublas"),
]


@pytest.mark.parametrize(("name", "capability", "lengths", "count", "form"), CHOICES)
def test_bilinear_form_by_sizes(
    name: str, capability: int, lengths: list[int], count: int, form: str, monkeypatch
) -> None:
    """Forms add in different orders, so equal bits show which form ran."""
    a, g, cu = rows(lengths, 150, 130)
    sample = Sample("segment_bilinear", name, (a, g, directions(count, 130, 150), cu))
    chosen = run(sample, capability)
    for forced in ("gradient", "fused", "cublas"):
        monkeypatch.setenv(BILINEAR, forced)
        assert torch.equal(run(sample, capability), chosen) == (forced == form), forced


@pytest.mark.parametrize(
    ("lengths", "d", "form"),
    [
        ([500, 480], 192, "gradient"),
        ([120, 110, 150], 260, "gram"),
        ([60, 40, 50, 30], 260, "clusters"),
    ],
)
def test_ghost_norm_form_by_sizes(lengths: list[int], d: int, form: str, monkeypatch) -> None:
    sample = Sample("ghost_norm", "", rows(lengths, d, d))
    chosen = run(sample, HOPPER)
    for forced in ("gram", "gradient", "clusters"):
        monkeypatch.setenv(GHOST, forced)
        assert torch.equal(run(sample, HOPPER), chosen) == (forced == form), forced


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("form", ["", "fused", "cublas"])
def test_few_blocks_do_all_tiles(form: str, capability: int, monkeypatch) -> None:
    """One multiprocessor runs 16 blocks, fewer than there are tiles, or rows of results."""
    a, g, cu = rows([200, 0, 411], 70, 40)
    sample = Sample("ghost_dot", "", (a, g, cu, *rows([300, 150, 1], 70, 40)))
    if form:
        monkeypatch.setenv(BILINEAR, form)
        sample = Sample("segment_bilinear", "", (a, g, directions(4, 40, 70), cu))
    with cuda_shim.device(multiprocessors=1):
        found = run(sample, capability)
        assert_right(sample, found)
        with cuda_shim.thread_order(cuda_shim.REVERSE):
            assert torch.equal(run(sample, capability), found)


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
@pytest.mark.parametrize("layer", [(300, 260), (70, 600), (900, 40)])
def test_clusters_of_every_size(layer: tuple[int, int], multiprocessors: int, monkeypatch) -> None:
    """The fewer tiles a multiprocessor has, the more blocks share one, of `a` or `g` by width."""
    monkeypatch.setenv(GHOST, "clusters")
    sample = Sample("ghost_norm", "", rows([200, 0, 3, 70], *layer))
    with cuda_shim.device(multiprocessors=multiprocessors):
        assert_right(sample, run(sample, HOPPER))


def test_clusters_of_other_sizes_in_turn(monkeypatch) -> None:
    """Four blocks share one sample, two share many.

    The device attributes that one launch sets hold for the next launch as well.
    """
    monkeypatch.setenv(GHOST, "clusters")
    with cuda_shim.device(multiprocessors=8):
        for n in (1, 40, 1):
            sample = Sample("ghost_norm", "", rows([64] * n, 600, 600))
            assert_right(sample, run(sample, HOPPER))


@pytest.mark.parametrize("form", ["gram", "gradient", "clusters"])
def test_more_segments_than_are_planned_at_once(form: str, monkeypatch) -> None:
    monkeypatch.setenv(GHOST, form)
    sample = Sample("ghost_norm", "", rows([3, 70, *[0] * 1100, 5, 0, 2], 24, 16))
    assert_right(sample, run(sample, HOPPER))


WRONG = [[0, 120, 80, 200], [0, -5, 80, 200], [0, 40, 80, 230], [3, 40, 80, 200]]


@pytest.mark.parametrize(
    ("op", "capability"),
    [
        *(("ghost_norm", c) for c in (AMPERE, HOPPER)),
        *(("ghost_dot", c) for c in (AMPERE, HOPPER)),
        *(("segment_bilinear", c) for c in (AMPERE, HOPPER)),
        ("segment_dot", HOPPER),  # does not read the capability
    ],
)
@pytest.mark.parametrize("offsets", WRONG)
def test_wrong_offsets_are_nan_and_reported(op: str, offsets: list[int], capability: int) -> None:
    """Accesses stay inside of tensors; a wrong segment gives NaN; the next call says so."""
    cuda_shim.load_kernels()
    a, g, good = rows([40, 40, 120], 96, 80)
    v = directions(2, 80, 96)

    def call(cu: torch.Tensor) -> torch.Tensor:
        args = {
            "ghost_norm": (a, g, cu),
            "ghost_dot": (a, g, good, a, g, cu),
            "segment_bilinear": (a, g, v, cu, False),
            "segment_dot": (g[None], g[None], cu),
        }[op]
        return cuda_shim.call(f"{cuda_shim.NAMESPACE}::{op}", *args)

    which = "cu_seqlens2" if op == "ghost_dot" else "cu_seqlens"
    with cuda_shim.device(capability_major=capability):
        wrong = call(torch.tensor(offsets, dtype=torch.int32))
        assert wrong.isnan().any() and not wrong.isnan().all()
        with pytest.raises(RuntimeError, match=f"{op}: `{which}` of an earlier call"):
            call(good)
        assert not call(good).isnan().any()


# Elements of a tensor: several stages and a part of one, whole stages, fewer than 16 bytes.
NUMELS = [5003, 1024, 3]


@pytest.mark.parametrize(
    ("dtype", "first"),
    [
        *((torch.bfloat16, k) for k in (0, 1)),
        *((torch.float32, k) for k in (0, 1)),
        (torch.float16, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_lists", [4, 8, 9, 16, 18])
def test_gram_of_many_lists(n_lists: int, dtype: torch.dtype, first: int) -> None:
    """Lists begin on 16 bytes, and one element off."""
    make = Maker(dtype, seed=n_lists)
    lists = [[make(first + n)[first:] for n in NUMELS] for _ in range(n_lists)]
    sample = Sample("multi_tensor_gram", "", (lists, [0, 1, 1]))
    found = run(sample, HOPPER)
    assert_close_to_formula(sample, found)
    with cuda_shim.thread_order(cuda_shim.SHUFFLED):
        assert torch.equal(run(sample, HOPPER), found)


@pytest.mark.parametrize("lengths", [[2100, 0, 3], [9, 40, 1, 0, 130]], ids=["long", "short"])
def test_sums_over_more_slices_than_are_loaded_at_once(lengths: list[int]) -> None:
    make = Maker(torch.float32, seed=5)
    total = sum(lengths)
    z, g = make(1, total, 18000 if total < 200 else 1032), make(1, total, 1)
    sample = Sample("segment_dot", "", (z, g.expand_as(z).contiguous(), rows(lengths, 1, 1)[2]))
    assert_close_to_formula(sample, run(sample, HOPPER))

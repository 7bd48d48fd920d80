"""The rules of csrc/cuda/choose.h against the times of every form on a GPU: benchmarks/results."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cuda_shim
import pytest
import torch
from gpu_inputs import Maker

if (_reason := cuda_shim.why_missing()) is not None:
    pytest.skip(_reason, allow_module_level=True)

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MEASURED = [
    ("nvidia-h100-80gb-hbm3.csv", 90, 132, 112),
    ("nvidia-h200.csv", 90, 132, 29),
]  # compute capability, multiprocessors, cases
FORMS = ("fused", "sm90", "cublas", "gradient")  # in the order of choose.h
NEARLY_BEST, AT_MOST, SHARE = 1.05, 1.2, 0.95
SHAPE = re.compile(r"(\d+)x(\d+) T=(\d+) M=(\d+)( short)?")


@cache
def milliseconds(file: str) -> dict[tuple[str, str], dict[str, float]]:
    """Times of the forms of segment_bilinear, by (shape, dtype)."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    with (RESULTS / file).open(newline="") as lines:
        for row in csv.DictReader(lines):
            form = row["provider"].removeprefix("ours:")
            if row["op"] == "segment_bilinear" and form in FORMS:
                found.setdefault((row["shape"], row["dtype"]), {})[form] = float(row["ms"])
    return found


def sizes_of(shape: str) -> list[int]:
    """Tokens, segments, d_in, d_out and directions of a case of benchmarks/gpu_cases.py."""
    d_in, d_out, total, m, short = SHAPE.fullmatch(shape).groups()
    longest = {"longest": 100} if short else {}
    bounds = Maker(torch.device("cpu")).bounds(int(total), **longest)
    return [bounds[-1], len(bounds) - 1, int(d_in), int(d_out), int(m)]


@cache
def rules() -> torch._ops._OpNamespace:
    cuda_shim.load("choose", [cuda_shim.SHIM / "choose.cu"], "cuda_shim_choose")
    return torch.ops.cuda_shim_choose


def chosen(rows: list[list[int]]) -> list[str]:
    return [FORMS[form] for form in rules().bilinear_forms(torch.tensor(rows)).tolist()]


class Case(NamedTuple):
    """A measured case: the times of its forms, the form that rules choose, and predicted times."""

    shape: str
    dtype: str
    ms: dict[str, float]
    form: str
    predicted_ms: dict[str, float]

    @property
    def over_the_best(self) -> float:
        return self.ms[self.form] / min(self.ms.values())

    def __str__(self) -> str:
        forms = ", ".join(
            f"{form} {ms:.3f} ({self.predicted_ms[form]:.3f})" for form, ms in self.ms.items()
        )
        return f"{self.over_the_best:.3f} {self.shape} {self.dtype}: {self.form} of {forms}"


def cases_of(file: str, capability: int, multiprocessors: int) -> list[Case]:
    """Every measured case, the worst choice first."""
    measured = milliseconds(file)
    rows = []
    for shape, dtype in measured:
        has_gradient = tensor_cores = dtype != "float32"
        rows.append([capability, multiprocessors, tensor_cores, has_gradient, *sizes_of(shape)])
    costs = rules().bilinear_costs(torch.tensor(rows)).double() / 1e3
    found = [
        Case(*case, ms, form, dict(zip(FORMS, predicted, strict=True)))
        for (case, ms), form, predicted in zip(
            measured.items(), chosen(rows), costs.tolist(), strict=True
        )
    ]
    return sorted(found, key=lambda case: -case.over_the_best)


def lines_of(cases: list[Case]) -> str:
    return "\n".join(
        ["over the best, case: the form chosen of all, ms (predicted)", *map(str, cases)]
    )


@pytest.mark.parametrize(("file", "capability", "multiprocessors", "n_cases"), MEASURED)
def test_the_form_chosen_is_nearly_the_best(
    file: str, capability: int, multiprocessors: int, n_cases: int
) -> None:
    cases = cases_of(file, capability, multiprocessors)
    assert len(cases) == n_cases
    over = [case.over_the_best for case in cases]
    assert max(over) <= AT_MOST, lines_of(cases[:10])
    nearly_best = sum(ratio <= NEARLY_BEST for ratio in over)
    assert nearly_best >= SHARE * len(over), lines_of(cases[:10])


@pytest.mark.parametrize(
    ("file", "capability", "multiprocessors"), [measured[:3] for measured in MEASURED]
)
@pytest.mark.parametrize("form", FORMS)
def test_predictions_are_near_what_was_measured(
    form: str, file: str, capability: int, multiprocessors: int
) -> None:
    """The rules need predictions within a factor of 1.5, at nine of ten cases."""
    cases = [
        case
        for case in cases_of(file, capability, multiprocessors)
        if case.dtype != "float32" and form in case.ms
    ]
    ratios = sorted(case.predicted_ms[form] / case.ms[form] for case in cases)
    low, high = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
    assert low >= 1 / 1.5 and high <= 1.5, (low, high, lines_of(cases[:10]))


GHOST_FORMS = (None, "gram", "gradient", "clusters")  # in the order of choose.h
EQUAL = re.compile(r"(\d+)x(\d+) T=(\d+) (\d+) each")


@pytest.mark.parametrize("file", [measured[0] for measured in MEASURED])
def test_the_form_of_norms_is_nearly_the_best(file: str) -> None:
    """The segments are of one length: others may take several forms in one call."""
    found: dict[tuple[int, ...], dict[str, float]] = {}
    with (RESULTS / file).open(newline="") as lines:
        for row in csv.DictReader(lines):
            case = EQUAL.fullmatch(row["shape"])
            # an H100's rows name clusters by tokens of a tile, of which those of 64 stayed
            form = row["provider"].removeprefix("ours:").replace("clusters64", "clusters")
            if row["op"] == "ghost_norm" and case and form in GHOST_FORMS:
                d_in, d_out, tokens, each = map(int, case.groups())
                sizes = (tokens, tokens // each, d_in, d_out)
                found.setdefault(sizes, {})[form] = float(row["ms"])
    assert len(found) == 12
    forms = rules().ghost_norm_forms(torch.tensor(list(found))).tolist()
    over = {
        (*sizes, GHOST_FORMS[form]): ms[GHOST_FORMS[form]] / min(ms.values())
        for (sizes, ms), form in zip(found.items(), forms, strict=True)
    }
    assert max(over.values()) <= NEARLY_BEST, over


HOPPER, AMPERE, BLACKWELL = (90, 132), (80, 108), (100, 148)


@pytest.mark.parametrize(
    ("device", "tensor_cores", "gradients", "sizes", "form"),
    [
        # a layer whose tiles fill the device, one with few tiles, and one with few directions
        (HOPPER, True, True, (8192, 32, 4096, 4096, 2), "sm90"),
        (HOPPER, True, True, (2048, 8, 4096, 1024, 2), "cublas"),
        (HOPPER, True, True, (2048, 8, 2048, 512, 4), "fused"),
        # two directions share a product where segments are long, but not for results by token
        (HOPPER, True, True, (16384, 4, 4096, 4096, 2), "gradient"),
        (HOPPER, True, False, (16384, 4, 4096, 4096, 2), "sm90"),
        (HOPPER, True, True, (16384, 4, 4096, 4096, 1), "sm90"),
        (HOPPER, True, True, (16384, 64, 2048, 128256, 2), "gradient"),
        (HOPPER, True, True, (16384, 500, 2048, 128256, 2), "sm90"),
        (HOPPER, False, False, (8192, 32, 4096, 4096, 2), "cublas"),
        (AMPERE, True, True, (8192, 32, 4096, 4096, 2), "gradient"),
        (AMPERE, True, True, (8192, 400, 2048, 4096, 2), "fused"),
        (AMPERE, True, True, (8192, 32, 4096, 4096, 1), "cublas"),
        (BLACKWELL, True, True, (8192, 32, 2048, 4096, 1), "cublas"),
    ],
)
def test_bilinear_form_by_sizes(
    device: tuple[int, int],
    tensor_cores: bool,
    gradients: bool,
    sizes: tuple[int, ...],
    form: str,
) -> None:
    assert chosen([[*device, tensor_cores, gradients, *sizes]]) == [form]

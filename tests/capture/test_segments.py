"""Which rows belong to which sample."""

from __future__ import annotations

import pytest
import torch

from geffect_fast.capture import Segments
from geffect_fast.capture.segments import segment_sum
from geffect_fast.errors import UnsupportedModelError

CU = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
PACKED = Segments.packed(CU)
KEPT = Segments.packed(CU, kept=torch.tensor([1, 2, 5, 9, 10, 11]))
RECTANGULAR = Segments.rectangular((3, 4))
PAIRS = Segments.rectangular((6, 4), rows_per_sample=2)
SINGLE = Segments.rectangular((1, 5))


@pytest.mark.parametrize(
    ("segments", "shape", "expected"),
    [
        (PACKED, (1, 12), [0, 4, 9, 12]),
        (PACKED, (12,), [0, 4, 9, 12]),
        (PACKED, (1, 12, 2), [0, 8, 18, 24]),  # heads behind the tokens
        (PACKED, (1, 1, 12), [0, 4, 9, 12]),
        (KEPT, (1, 12), [0, 4, 9, 12]),
        (KEPT, (1, 6), [0, 2, 3, 6]),  # logits of some tokens only
        (KEPT, (6,), [0, 2, 3, 6]),
        (KEPT, (1, 12, 6), [0, 24, 54, 72]),  # as many heads as kept tokens: behind all tokens
        (RECTANGULAR, (3, 4), [0, 4, 8, 12]),
        (RECTANGULAR, (12,), [0, 4, 8, 12]),
        (RECTANGULAR, (12, 2), [0, 8, 16, 24]),
        (RECTANGULAR, (3,), [0, 1, 2, 3]),
        (RECTANGULAR, (3, 2, 4), [0, 8, 16, 24]),  # heads before the tokens
        (RECTANGULAR, (3, 1), [0, 1, 2, 3]),  # one logit a row
        (PAIRS, (6, 4), [0, 8, 16, 24]),
        (PAIRS, (24,), [0, 8, 16, 24]),
        (PAIRS, (6, 2, 4), [0, 16, 32, 48]),
        (SINGLE, (5,), [0, 5]),
        (SINGLE, (7, 3), [0, 21]),  # whatever it is, it is the one sample's
        (SINGLE, (), [0, 1]),
        (Segments.packed(torch.tensor([0, 8])), (3,), [0, 3]),
    ],
)
def test_rows(segments, shape, expected):
    rows = segments.rows(shape, "m")
    assert rows.dtype == torch.int32 and rows.tolist() == expected


@pytest.mark.parametrize(
    ("segments", "shape"),
    [
        (PACKED, (1, 12, 12)),  # as many heads as tokens: which axis is which?
        (KEPT, (1, 6, 12)),
        (KEPT, (1, 6, 6)),
        (PACKED, (1, 2, 12)),  # heads before the tokens: no sample owns neighbouring rows
        (PACKED, (1, 5)),  # a router sent some elsewhere
        (PACKED, (2, 6)),
        (PACKED, ()),
        (RECTANGULAR, (4, 3)),  # axes swapped
        (RECTANGULAR, (5,)),
        (RECTANGULAR, (1, 4)),
        (RECTANGULAR, ()),
        (PAIRS, (3, 4)),
    ],
)
def test_rows_that_cannot_be_told_apart_name_the_module(segments, shape):
    with pytest.raises(
        UnsupportedModelError, match=r"module 'a\.b' was called with rows"
    ) as caught:
        segments.rows(shape, "a.b")
    assert str(shape) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_the_input():
    assert [s.n_rows for s in (PACKED, KEPT, RECTANGULAR, PAIRS, SINGLE)] == [1, 1, 3, 6, 1]
    assert [s.n_samples for s in (PACKED, KEPT, RECTANGULAR, PAIRS, SINGLE)] == [3, 3, 3, 3, 1]


def test_segment_sum_is_fp64_with_empty_segments():
    values = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.bfloat16)
    sums = segment_sum(values, torch.tensor([0, 2, 2, 3]))
    assert sums.dtype == torch.float64 and sums.tolist() == [[3.0], [0.0], [4.0]]

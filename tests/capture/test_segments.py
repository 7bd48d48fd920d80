"""The assignment of a module's rows to samples."""

from __future__ import annotations

import pytest
import torch

from geffect_fast.capture import Segments
from geffect_fast.capture.segments import Offsets, segment_sum
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
        (PACKED, (1, 2, 12), [0, 8, 18, 24]),  # heads before the tokens
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
        (SINGLE, (7, 3), [0, 21]),  # whatever these rows are, they belong to the one sample
        (SINGLE, (), [0, 1]),
        (Segments.packed(torch.tensor([0, 8])), (3,), [0, 3]),
    ],
)
def test_rows(segments, shape, expected):
    cu = segments.rows(shape, "m").cu
    on_device = cu.on(torch.device("cpu"))
    assert on_device.dtype == torch.int32 and list(cu.host) == on_device.tolist() == expected


@pytest.mark.parametrize(
    ("segments", "shape"),
    [
        (PACKED, (1, 12, 12)),  # as many heads as tokens: the axis of the tokens is in doubt
        (KEPT, (1, 6, 12)),
        (KEPT, (1, 6, 6)),
        (PACKED, (12, 12)),
        (KEPT, (1, 3, 6, 12)),  # behind other axes, both may be tokens
        (PACKED, (1, 5)),  # a router sent some tokens elsewhere
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


PACKED_OWNER = torch.arange(3).repeat_interleave(CU.diff())
OWNER = torch.arange(3)
TOKEN = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("segments", "owner"),
    [
        (PACKED, PACKED_OWNER[None, :, None].expand(1, 12, 2)),
        (PACKED, PACKED_OWNER[None, None].expand(1, 2, 12)),
        (PACKED, PACKED_OWNER[None].expand(2, 12)),
        (PACKED, PACKED_OWNER[:, None].expand(12, 2)),
        (RECTANGULAR, OWNER[:, None, None].expand(3, 4, 2)),
        (RECTANGULAR, OWNER[:, None, None].expand(3, 2, 4)),
        (RECTANGULAR, OWNER.repeat_interleave(4)[:, None].expand(12, 2)),
        (Segments.tokens((3, 4)), TOKEN),
        (Segments.tokens((3, 4)), TOKEN[:, :, None].expand(3, 4, 2)),
        (Segments.tokens((3, 4)), TOKEN[:, None].expand(3, 2, 4)),
        (Segments.tokens((3, 4)), TOKEN.view(12, 1).expand(12, 2)),
    ],
)
def test_rows_of_one_sample_are_those_that_hold_it(segments, owner):
    """The axis of the tokens may be anywhere; `owner` names the sample of every row."""
    x = owner[..., None].expand(*owner.shape, 5) + 1.0
    rows = segments.rows(owner.shape, "m")
    for i in range(segments.n_samples):
        own = rows.flat(x)[rows.cu[i]]
        assert len(own) == int((owner == i).sum()) and bool((own == i + 1).all())
        assert torch.equal(rows.only(x, i), torch.where(x == i + 1, x, 0))


def test_an_axis_learned_once_settles_a_doubt():
    known = {}
    doubtful = Segments.packed(torch.tensor([0, 1, 2]))  # two tokens, and two heads below
    with pytest.raises(UnsupportedModelError):
        doubtful.rows((1, 2, 2), "m", known)
    PACKED.rows((1, 2, 12), "m", known)
    PACKED.rows((1, 12, 2), "other", known)
    assert doubtful.rows((1, 2, 2), "m", known).axis == 2
    assert doubtful.rows((1, 2, 2), "other", known).axis == 1
    with pytest.raises(UnsupportedModelError):
        doubtful.rows((1, 3, 3), "m", known)


def test_rows_of_the_input():
    assert [s.n_rows for s in (PACKED, KEPT, RECTANGULAR, PAIRS, SINGLE)] == [1, 1, 3, 6, 1]
    assert [s.n_samples for s in (PACKED, KEPT, RECTANGULAR, PAIRS, SINGLE)] == [3, 3, 3, 3, 1]


@pytest.mark.parametrize("lengths", [[300] * 3, [1] * 5, [1, 0, 700], [0], [40]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_segment_sum(lengths, dtype):
    """Sums over segments of any lengths are as exact as their input, also long sums of one sign."""
    values = (torch.rand(sum(lengths), 2, 3) + 1).to(dtype)
    expected = torch.stack([x.double().sum(0) for x in values.split(lengths)])
    sums = segment_sum(values, Offsets.of(lengths))
    rtol = 1e-14 if dtype == torch.float64 else 5e-7
    torch.testing.assert_close(sums, expected, rtol=rtol, atol=0)


def test_segment_sum_is_fp64_with_empty_segments():
    values = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.bfloat16)
    sums = segment_sum(values, Offsets((0, 2, 2, 3)))
    assert sums.dtype == torch.float64 and sums.tolist() == [[3.0], [0.0], [4.0]]

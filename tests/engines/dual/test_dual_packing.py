"""A packed batch as sequences side by side: every token once, no sequence sees another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from geffect_fast.engines.dual.packing import SHARE, SHORT, Packing

CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_every_token_stands_at_its_place(lengths):
    packing = Packing.of(lengths, CPU)
    assert packing.longest == max(lengths)
    places = torch.cat([group.index.flatten() for group in packing.groups])
    assert torch.equal(places[packing.place], torch.arange(sum(lengths)))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    owner = torch.searchsorted(starts, torch.arange(sum(lengths)), right=True) - 1
    for group in packing.groups:
        n, longest = group.index.shape
        of = owner[group.index]
        assert (of == of[:, :1]).all()  # padding belongs to the same sequence
        own = torch.tensor(lengths)[of[:, 0]]
        expected = torch.arange(longest) >= own[:, None]
        hidden = torch.zeros(n, longest, dtype=torch.bool)
        if group.hidden is not None:
            hidden = group.hidden[:, 0, 0]
        assert torch.equal(hidden, expected)


@settings(deadline=None, max_examples=50)
@given(lengths)
def test_few_groups_and_little_padding(lengths):
    groups = Packing.of(lengths, CPU).groups
    assert len(groups) <= 1 + max(0, (max(lengths) // SHORT).bit_length())
    for group in groups:
        longest = group.index.shape[1]
        shortest = longest if group.hidden is None else int((~group.hidden).sum(-1).min())
        assert longest <= SHORT or shortest >= SHARE * longest


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("window", [3, 100])
def test_attention_under_a_mask_of_all_tokens(kind, window):
    """Attention by groups equals attention of all tokens under the whole mask, with windows too."""
    sizes = [70, 9, 30, 9, 150]
    packing, total = Packing.of(sizes, CPU), sum(sizes)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, total, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    sequence = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    back = torch.arange(total)[:, None] - torch.arange(total)
    mask = (sequence[:, None] == sequence) & (back >= 0) & (back < window)
    if kind == "added":
        mask = torch.zeros(total, total, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    mask = mask[None, None]
    assert packing.masks(mask) and not packing.masks(mask[..., 1:]) and not packing.masks(None)

    def attend(q, k, v, number):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=packing.block(mask, number))

    found = packing.apart(q, k, v, attend)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for number, group in enumerate(packing.groups):
        assert packing.block(mask, number) is packing.block(mask, number)
        assert packing.block(mask, number).shape == (
            len(group.index),
            1,
            *[group.index.shape[1]] * 2,
        )

"""Batches hold the set's own tokens, each once, and weights that add up to the set's means."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from geffect_fast.data.batch import IGNORE, REDUCTIONS
from geffect_fast.data.memory import free_memory
from geffect_fast.data.packing import LAYOUTS, make_batches
from geffect_fast.data.samples import Sample, SampleSet, TokenSequence
from geffect_fast.errors import InputError

ROLES = [("answer",), ("alternative",), ("answer", "alternative")]


@st.composite
def sequences(draw) -> TokenSequence:
    """Sequences of 2 to 12 tokens with labels anywhere, at least one behind the first token."""
    ids = draw(st.lists(st.integers(0, 99), min_size=2, max_size=12))
    labelled = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    labelled[draw(st.integers(1, len(ids) - 1))] = True
    labels = [i if on else IGNORE for i, on in zip(ids, labelled, strict=True)]
    return TokenSequence(torch.tensor(ids), torch.tensor(labels))


def weighted(sequence: TokenSequence) -> TokenSequence:
    """A sequence with a different weight at every label."""
    weights = torch.arange(1.0, len(sequence) + 1, dtype=torch.float64) / 8
    weights[sequence.labels == IGNORE] = 0
    return replace(sequence, weights=weights)


@st.composite
def sample_sets(draw) -> SampleSet:
    several = st.lists(sequences(), min_size=1, max_size=3).map(tuple)
    pairs = draw(st.lists(st.tuples(sequences(), several), min_size=1, max_size=9))
    samples = [Sample(i, f"q{i}", a, b) for i, (a, b) in enumerate(pairs)]
    return SampleSet("forget", tuple(samples))


case = given(
    sample_sets(),
    st.sampled_from(ROLES),
    st.integers(1, 60),
    st.sampled_from(LAYOUTS),
)
few = settings(max_examples=40, deadline=None)


def size_of(sample, roles, layout) -> int:
    """Tokens that a sample takes in a batch."""
    lengths = [len(sequence) for _, sequence in played(sample, roles)]
    return sum(lengths) if layout == "packed" else max(lengths) * len(lengths)


def played(sample, roles) -> list[tuple[str, TokenSequence]]:
    """Role and sequence of everything that a sample adds to a batch."""
    found = {"answer": [sample.answer], "alternative": sample.alternatives}
    return [(role, sequence) for role in roles for sequence in found[role]]


@few
@case
def test_every_sample_is_there_once_with_its_own_tokens(sample_set, roles, budget, layout):
    batches = make_batches(sample_set, roles, token_budget=budget, layout=layout)
    rows = [row for batch in batches for row in batch.rows]
    if layout == "equal_length":
        assert sorted(rows) == list(range(len(sample_set)))
    else:
        assert rows == list(range(len(sample_set)))
    for batch in batches:
        samples = [sample_set.samples[row] for row in batch.rows]
        pairs = [pair for s in samples for pair in played(s, roles)]
        expected = [sequence for _, sequence in pairs]
        counts = [len(played(s, roles)) for s in samples]
        assert batch.roles == tuple(role for role, _ in pairs)
        assert batch.sequence_sample.tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
        ids, positions = batch.input_ids.flatten(), batch.position_ids
        assert (positions is None) == (layout != "packed")
        bounds = batch.cu_seqlens.tolist()
        assert len(bounds) == len(expected) + 1 and bounds[-1] == batch.total_tokens == len(ids)
        for sequence, start, end in zip(expected, bounds, bounds[1:], strict=False):
            own = start + len(sequence)
            assert ids[start:own].tolist() == sequence.input_ids.tolist()
            assert batch.labels[start:own].tolist() == sequence.labels.tolist()
            if positions is not None:
                assert positions[0, start:end].tolist() == list(range(end - start))
            # A position predicts the next label of its own sequence, never a neighbour's.
            assert batch.targets[start : own - 1].tolist() == sequence.labels[1:].tolist()
            assert (batch.targets[own - 1 : end] == IGNORE).all()
            assert (batch.labels[own:end] == IGNORE).all()
            assert layout != "packed" or own == end
        assert batch.cu_samples.tolist() == [bounds[n] for n in accumulate(counts, initial=0)]
        assert batch.cu_seqlens.dtype == batch.cu_samples.dtype == torch.int32
        assert batch.input_ids.dtype == torch.int64
        assert positions is None or positions.dtype == torch.int64
        if layout == "packed":
            assert batch.packed and batch.input_ids.shape == (1, batch.total_tokens)
        else:
            assert batch.input_ids.shape == (len(expected), batch.total_tokens // len(expected))
            assert len(set(counts)) == 1


@few
@case
def test_batches_are_as_large_as_the_budget_allows(sample_set, roles, budget, layout):
    batches = make_batches(sample_set, roles, token_budget=budget, layout=layout)
    if layout == "single":
        assert [batch.n_samples for batch in batches] == [1] * len(sample_set)
        return
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        assert batch.total_tokens <= budget or batch.n_samples == 1
        if after is None:
            continue
        size = size_of(sample_set.samples[after.rows[0]], roles, layout)
        same = layout == "packed" or rectangle(batch) == rectangle(after)
        assert not same or batch.total_tokens + size > budget
    if layout == "equal_length":
        lengths = [batch.input_ids.shape[1] for batch in batches]
        assert lengths == sorted(lengths, reverse=True)


@few
@case
def test_weights_of_the_data_stand_where_their_label_is_predicted(
    sample_set, roles, budget, layout
):
    samples = tuple(replace(s, answer=weighted(s.answer)) for s in sample_set.samples)
    bare = make_batches(sample_set, roles, token_budget=budget, layout=layout)
    assert all(batch.weights is None for batch in bare)
    batches = make_batches(SampleSet("f", samples), roles, token_budget=budget, layout=layout)
    if "answer" not in roles:
        assert all(batch.weights is None for batch in batches)
        return
    for batch in batches:
        assert batch.weights.dtype == torch.float64
        expected = torch.zeros(batch.total_tokens, dtype=torch.float64)
        for q, start in enumerate(batch.cu_seqlens[:-1].tolist()):
            if batch.roles[q] == "answer":
                own = samples[batch.rows[batch.sequence_sample[q]]].answer.weights[1:]
                expected[start : start + len(own)] = own
        assert torch.equal(batch.weights, expected)
        assert torch.equal(batch.weights > 0, batch.target_mask("answer"))
        assert batch.to("meta").weights.device.type == "meta"


def rectangle(batch) -> tuple[int, int]:
    """The length of a batch's sequences, and the number of sequences a sample."""
    return batch.input_ids.shape[1], len(batch.roles) // batch.n_samples


@few
@case
def test_totals_are_those_of_the_whole_set(sample_set, roles, budget, layout):
    batches = make_batches(sample_set, roles, token_budget=budget, layout=layout)
    for batch in batches:
        assert batch.totals == sample_set.totals() and batch.totals.n_samples == len(sample_set)
    for role in roles:
        n_targets = sum(int(batch.target_mask(role).sum()) for batch in batches)
        assert n_targets == sample_set.totals().n_targets[role]
        n_labelled = sum(int(batch.label_mask(role).sum()) for batch in batches)
        assert n_labelled == sample_set.totals().n_labelled[role]
    n_all = sum(batch.target_index.numel() for batch in batches)
    assert n_all == sum(sample_set.totals().n_targets[role] for role in roles)


@few
@case
def test_weights_are_means_over_tokens_or_samples(sample_set, roles, budget, layout):
    totals = sample_set.totals()
    for reduction in REDUCTIONS:
        batches = make_batches(
            sample_set, roles, token_budget=budget, layout=layout, reduction=reduction
        )
        for role in roles:
            for weigh, count in (("target", totals.n_targets), ("label", totals.n_labelled)):
                weights = [getattr(b, f"{weigh}_weight")(role) for b in batches]
                expected = float(count[role]) if reduction == "sum" else 1.0
                assert float(sum(w.sum() for w in weights)) == pytest.approx(expected, rel=1e-12)
                for batch, weight in zip(batches, weights, strict=True):
                    mask = getattr(batch, f"{weigh}_mask")(role)
                    assert weight.dtype == torch.float64 and (weight[~mask] == 0).all()
                    per_sample = batch.sample_sum(weight, mask)
                    if reduction == "sample":
                        share = torch.full_like(per_sample, 1 / totals.n_samples)
                        assert torch.allclose(per_sample, share, rtol=1e-12)
                    else:
                        one = 1.0 if reduction == "sum" else 1 / count[role]
                        assert (weight[mask] == one).all()
        shares = sum(batch.sample_weight() * batch.n_samples for batch in batches)
        assert shares == pytest.approx(len(sample_set) if reduction == "sum" else 1.0)


@few
@case
def test_from_tokens_to_samples_and_back(sample_set, roles, budget, layout):
    for batch in make_batches(sample_set, roles, token_budget=budget, layout=layout):
        number = torch.arange(batch.n_samples, dtype=torch.float64)
        spread = batch.spread(number)
        sequence = batch.token_sequence()
        assert sequence.dtype == torch.int64
        for i, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
            assert (sequence[start:end] == i).all()
        for i, (start, end) in enumerate(pairwise(batch.cu_samples.tolist())):
            assert (spread[start:end] == i).all()
        everywhere = torch.ones(batch.total_tokens, dtype=torch.bool)
        sums = batch.sample_sum(spread + 1, everywhere)
        assert torch.equal(sums, (number + 1) * batch.cu_samples.diff())
        ones = torch.ones(batch.total_tokens)
        assert torch.equal(batch.sequence_sum(ones, everywhere), batch.cu_seqlens.diff().float())
        moved = batch.to("meta")
        assert moved.input_ids.device.type == "meta" and moved.rows == batch.rows


def make_set(*lengths: tuple[int, int | None]) -> SampleSet:
    def sequence(n):
        return TokenSequence(torch.arange(n), torch.arange(n))

    samples = [
        Sample(i, "", sequence(a), () if b is None else (sequence(b),))
        for i, (a, b) in enumerate(lengths)
    ]
    return SampleSet("forget", tuple(samples))


@few
@given(sample_sets(), st.sampled_from(LAYOUTS), st.integers(1, 4))
def test_the_first_targets_of_every_sequence_can_be_left_out(sample_set, layout, skip):
    roles = ("answer", "alternative")
    for reduction in REDUCTIONS:
        batches = make_batches(
            sample_set, roles, token_budget=50, layout=layout, reduction=reduction
        )
        for role in roles:
            n_left = 0
            for batch in batches:
                expected = torch.zeros(batch.total_tokens, dtype=torch.float64)
                for q, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
                    known = [t for t in range(start, end) if batch.targets[t] != IGNORE]
                    expected[known[skip:]] = float(batch.roles[q] == role)
                assert torch.equal(batch.target_mask(role, skip), expected.bool())
                n_left += int(expected.sum())
                weight = batch.target_weight(role, skip)
                if reduction == "sum":
                    assert torch.equal(weight, expected)
                elif reduction == "token":
                    n = sample_set.totals().n_targets_after(role, skip)
                    torch.testing.assert_close(weight, expected / max(n, 1), rtol=1e-15, atol=0)
                else:
                    n_i = batch.sample_sum(expected, expected.bool())
                    share = (n_i > 0).double() / batch.totals.n_samples
                    per_sample = batch.sample_sum(weight, expected.bool())
                    torch.testing.assert_close(per_sample, share, rtol=1e-12, atol=0)
                    assert not weight[expected == 0].any()
            assert n_left == sample_set.totals().n_targets_after(role, skip)


def test_packing_by_hand():
    batches = make_batches(make_set((3, 2), (4, 5), (2, 2)), ("answer",), token_budget=7)
    assert [batch.rows for batch in batches] == [(0, 1), (2,)]
    assert batches[0].position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batches[0].targets.tolist() == [1, 2, IGNORE, 1, 2, 3, IGNORE]
    assert batches[0].totals.n_targets == {"answer": 2 + 3 + 1, "alternative": 1 + 4 + 1}


def test_a_pair_of_unequal_lengths_repeats_its_last_token():
    roles, pairs = ("answer", "alternative"), make_set((3, 2), (1, 3))
    first, second = make_batches(pairs, roles, token_budget=99, layout="single")
    assert first.input_ids.tolist() == [[0, 1, 2], [0, 1, 1]]
    assert second.labels.tolist() == [0, -100, -100, 0, 1, 2]
    assert second.cu_samples.tolist() == [0, 6] and second.cu_seqlens.tolist() == [0, 3, 6]
    [batch] = make_batches(pairs, roles, token_budget=99, layout="equal_length")
    assert batch.input_ids.tolist() == [[0, 1, 2], [0, 1, 1], [0, 0, 0], [0, 1, 2]]
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, -100, 0, -100, -100, 0, 1, 2]
    assert batch.targets.tolist() == [1, 2, -100, 1, -100, -100, -100, -100, -100, 1, 2, -100]


def test_repeated_tokens_change_no_output_and_no_gradient_of_a_causal_model():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=16)
    model = GPT2LMHeadModel(config).eval().double()
    sample_set = make_set((4, 9), (7, 3))
    losses, gradients = [], []
    for layout in ("equal_length", "packed", "single"):
        model.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        roles = ("answer", "alternative")
        for batch in make_batches(sample_set, roles, token_budget=18, layout=layout):
            logits = model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
            loss = loss + torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.targets, ignore_index=IGNORE, reduction="sum"
            )
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_budget": 0}, r"token_budget: 0 is no whole number of at least 1"),
        ({"token_budget": 2.5}, r"token_budget: 2.5 is no"),
        ({"token_budget": True}, r"token_budget: True is no"),
        ({"layout": "padded"}, r"layout: 'padded' is none of packed, equal_length, single"),
        ({"reduction": "mean"}, r"reduction: 'mean' is none of token, sample, sum"),
        ({"roles": ()}, r"roles: \(\) is none of"),
        ({"roles": ("alternative", "answer")}, r"roles: .* both in this order"),
        ({"roles": ("alternative",)}, r"forget: row 1 .* has no alternative answer; give refusals"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"roles": ("answer",), "token_budget": 9} | arguments
    with pytest.raises(InputError, match=message) as caught:
        make_batches(make_set((3, 2), (4, None)), **arguments)
    assert "\n" not in str(caught.value)


# ---- memory ----


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n"}
AVAILABLE = 1000 * 1024


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, AVAILABLE),
        # cgroups, version 2: the group has no limit, its parent has one; dropped cache counts as
        # free.
        ({"proc/self/cgroup": "0::/a/b\n",
          "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/memory.current": "5\n",
          "sys/fs/cgroup/a/b/memory.stat": "inactive_file 3\n",
          "sys/fs/cgroup/a/memory.max": "900\n", "sys/fs/cgroup/a/memory.current": "500\n",
          "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 40\n"}, 900 - 500 + 40),
        # Version 1, in a container that sees its own group at the root.
        ({"proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/host/path\n0::/\n",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "700\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "300\n",
          "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 30\n"},
         700 - 300 + 30),
        # No limit, as version 1 writes it.
        ({"proc/self/cgroup": "4:memory:/\n",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "300\n",
          "sys/fs/cgroup/memory/memory.stat": "cache 1\n"}, AVAILABLE),
        # More memory is in use than the limit allows.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5\n",
          "sys/fs/cgroup/memory.current": "9\n", "sys/fs/cgroup/memory.stat": ""}, 0),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_tightest_group_leaves(tmp_path, files, expected):
    write(tmp_path, MEMINFO | files)
    assert free_memory(torch.device("cpu"), tmp_path) == expected


def test_free_memory_of_this_machine():
    assert 0 < free_memory(torch.device("cpu")) < 2**50

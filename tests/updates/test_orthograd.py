"""OrthoGrad against a QR of stored gradients: values, orthogonality, batches, and memory."""

from __future__ import annotations

import copy
import errno
import gc
import io
import os
from itertools import combinations

import pytest
import torch
from explicit import Explicit, OfRows, basis, cosine, flat, trained
from models import build, fp64_throughout, samples, with_dropout

from geffect_fast.capture import Lookup, Outer, RowSum
from geffect_fast.capture.segments import Offsets
from geffect_fast.errors import InputError, NonFiniteError, UnsupportedModelError
from geffect_fast.updates import OrthoGrad, Updater, kept_rows, retain_rows
from geffect_fast.updates.kept_rows import KeptRows

FORGET = samples([7, 12, 5], 1, 2)
RETAIN = samples([9, 9, 9, 6, 6, 6, 11], 2, 3)
REPEATED = [*RETAIN[:3], RETAIN[1], RETAIN[0], *RETAIN[3:5], RETAIN[3]]


def updated(model, losses, rule=None):
    Updater(rule or OrthoGrad(), model).update(losses)
    return flat([p.grad for p in trained(model)], trained(model))


@pytest.mark.parametrize(
    ("architecture", "weight", "retain", "size"),
    [
        pytest.param("llama", 0.0, RETAIN, 100, id="batches"),
        pytest.param("llama", 1.0, REPEATED, 2, id="pairs of repeated rows"),
        pytest.param("llama_tied", 0.0, REPEATED, 1, id="repeated rows one by one"),
        pytest.param("llama_tied", 1.0, RETAIN, 2, id="pairs"),
        pytest.param("gpt2", 0.0, REPEATED, 100, id="batches of repeated rows"),
        pytest.param("gpt2", 1.0, RETAIN, 1, id="one by one"),
        pytest.param("gpt2", 0.0, RETAIN[:1], 1, id="one row"),
    ],
)
def test_it_is_the_projection_by_qr_in_fp64(architecture, weight, retain, size):
    with fp64_throughout():
        model = build(architecture, torch.float64)
        explicit = Explicit(model, FORGET, retain, weight)
        expected = explicit.orthograd(None)
        rule = OrthoGrad(rank_tol=1e-10)
        found = updated(model, OfRows(model, FORGET, retain, retain_weight=weight, size=size), rule)
        assert float((found - expected).norm() / expected.norm()) < 1e-9
        if not weight:
            rows = explicit.rows()
            assert max(abs(cosine(found, row)) for row in rows) < 1e-9
            f = explicit.f()
            assert max(abs(cosine(f, row)) for row in rows) > 1e-2


@pytest.mark.parametrize(
    ("architecture", "retain"),
    [
        *(("llama", RETAIN), ("llama_tied", REPEATED), ("gpt2", RETAIN), ("gemma2", REPEATED)),
        ("phi", RETAIN),
    ],
    ids=["llama", "llama_tied", "gpt2", "gemma2", "phi"],
)
def test_it_is_the_projection_by_qr_in_fp32(architecture, retain):
    model = build(architecture)
    explicit = Explicit(copy.deepcopy(model).double(), FORGET, retain, 0.0)
    expected = explicit.orthograd(None)
    found = updated(model, OfRows(model, FORGET, retain, retain_weight=0.0, size=3)).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert max(abs(cosine(found, row)) for row in explicit.rows()) < 1e-5


@pytest.mark.parametrize("room", [0, 100])
@pytest.mark.parametrize("retain", [RETAIN, REPEATED], ids=["rows", "repeated"])
def test_in_bf16_it_is_as_far_off_as_plain_gradients_are(retain, room):
    """Repeated rows are recognised, though rounding makes them differ."""
    model = build("llama", torch.bfloat16)
    exact = copy.deepcopy(model).double()
    explicit, rounded = Explicit(exact, FORGET, retain, 0.0), Explicit(model, FORGET, retain, 0.0)
    f = explicit.f()
    plain = float((rounded.f().double() - f).norm() / f.norm())
    losses = OfRows(model, FORGET, retain, retain_weight=0.0, size=2)
    found = updated(model, losses, OrthoGrad(room=room)).double()
    assert float((found - explicit.orthograd(None)).norm() / f.norm()) < 2 * plain + 0.004
    assert 1e-4 < plain < 0.02
    assert max(abs(cosine(found, row)) for row in explicit.rows()) < 0.02


def test_rows_without_a_gradient_protect_nothing():
    """A row without labels has a gradient of zero; the others count as without this row."""
    blank = {"input_ids": RETAIN[0]["input_ids"], "labels": [-100] * 9}
    model = build("llama", torch.float64)
    with_it = updated(model, OfRows(model, FORGET, [*RETAIN[:3], blank], retain_weight=0.0))
    for p in model.parameters():
        p.grad = None
    without = updated(model, OfRows(model, FORGET, RETAIN[:3], retain_weight=0.0))
    torch.testing.assert_close(with_it, without, rtol=1e-9, atol=1e-12)


def test_a_larger_tolerance_leaves_fewer_directions_out():
    """For rows that are nearly equal, the tolerance leaves only their common direction."""
    model = build("llama", torch.float64)
    losses = OfRows(model, FORGET, RETAIN, retain_weight=0.0)
    rows = Explicit(model, FORGET, RETAIN, 0.0).rows()
    found = updated(model, losses, OrthoGrad(rank_tol=0.999))
    unit = rows / rows.norm(dim=1, keepdim=True)
    first = torch.linalg.svd(unit, full_matrices=False).Vh[0]
    f = Explicit(model, FORGET, RETAIN, 0.0).f()
    torch.testing.assert_close(found, f - (first @ f) * first, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("room", [0, 2e5, 1e9], ids=["none", "some", "all"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_row_runs_once_wherever_it_is_kept(size, room, monkeypatch):
    """Memory alone decides where rows are kept."""
    model = build("llama", torch.float64)
    losses = OfRows(model, FORGET, RETAIN, size=size)
    plan = Updater(OrthoGrad(), model)._planned()
    explicit = Explicit(model, FORGET, RETAIN)
    f = explicit.f()
    pieces = f.split([p.numel() for p in trained(model)])
    direction = {
        name: piece.view_as(p)
        for (name, p), piece in zip(plan.parameters.items(), pieces, strict=True)
    }
    runs = []

    def counted(plan, losses, batch, *rest):
        runs.append(batch.n_rows)
        return record(plan, losses, batch, *rest)

    record = retain_rows.record_rows
    monkeypatch.setattr(retain_rows, "record_rows", counted)
    batches = losses.retain_batches()
    found = retain_rows.row_products(plan, batches, direction, room, "orthograd")
    rows = explicit.rows()
    torch.testing.assert_close(found.gram, rows @ rows.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.products, rows @ f, rtol=1e-6, atol=1e-9)
    assert sum(runs) == len(RETAIN)
    here, away = _bytes_kept(found.kept)
    assert here <= room / 3
    assert {0: here == 0, 2e5: min(here, away) > 0, 1e9: away == 0}[room]


def _bytes_kept(kept):
    """Bytes kept on the device, and bytes kept elsewhere."""
    away = kept._elsewhere
    return kept._held, 0 if away is None else os.fstat(away._file.fileno()).st_size


def _factors(batch):
    """Factors of every kind, dtype and layout; two of them share an input."""
    generator = torch.Generator().manual_seed(batch)
    cu, shared = Offsets.of([2, 3]), torch.randn(5, 6, generator=generator)
    g = torch.randn(5, 4, generator=generator)
    return {
        "q": Outer(shared, g, cu),
        "k": Outer(shared, torch.randn(4, 5, generator=generator).T, cu, transposed=True),
        "table": Lookup(torch.tensor([3, 1, 2, 1, 0]), g.bfloat16(), cu, 7),
        "bias": RowSum(torch.randn(2, 4, dtype=torch.float64, generator=generator)),
    }


def test_what_waits_in_a_file_comes_back_as_it_was():
    """An input that several layers share is written once."""
    kept, given = KeptRows(0, "orthograd"), [_factors(batch) for batch in range(3)]
    for batch, factors in enumerate(given):
        for name, factor in factors.items():
            kept.keep(name, batch, [factor])
    once = 5 * 6 * 4 + 2 * 5 * 4 * 4 + 5 * 8 + 5 * 4 * 2 + 2 * 4 * 8
    assert _bytes_kept(kept) == (0, 3 * once)
    for name in kept.names():
        for batch, (found,) in kept.batches(name):
            expected = given[batch][name]
            assert type(found) is type(expected)
            for key, value in vars(expected).items():
                if isinstance(value, torch.Tensor):
                    torch.testing.assert_close(getattr(found, key), value, rtol=0, atol=0)
                else:
                    assert getattr(found, key) == value


@pytest.mark.parametrize("room", [0, 240, 600, 1e9])
def test_every_two_batches_meet_once(room):
    kept = KeptRows(room, "orthograd")
    for batch in range(6):
        kept.keep("p", batch, [RowSum(torch.full((1, 5), float(batch), dtype=torch.float64))])
    met = [(i, int(a[0].sums[0, 0]), j, int(b[0].sums[0, 0])) for i, a, j, b in kept.pairs("p")]
    assert sorted(met) == [(i, i, j, j) for i, j in combinations(range(6), 2)]


def test_a_full_disk_is_one_line(monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept_rows.tempfile, "TemporaryFile", Full)
    model = build("llama")
    losses = OfRows(model, FORGET, RETAIN, size=2)
    with pytest.raises(InputError, match=r"No space left on device; use fewer retain rows") as told:
        updated(model, losses, OrthoGrad(room=0))
    assert "\n" not in str(told.value)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "size", "room"),
    [
        *(("llama_tied", 100, 0), ("gpt2", 2, 0), ("gpt2", 100, 0.5), ("llama_tied", 2, 0.5)),
        *(("gpt2", 2, 1), ("llama_tied", 2, 100), ("gpt2", 100, 100)),
    ],
)
def test_the_room_changes_nothing_but_what_it_takes(architecture, size, room):
    with fp64_throughout():
        model = build(architecture, torch.float64)
        expected = Explicit(model, FORGET, RETAIN, 0.5).orthograd(None)
        losses = OfRows(model, FORGET, RETAIN, retain_weight=0.5, size=size)
        found = updated(model, losses, OrthoGrad(rank_tol=1e-10, room=room))
        assert float((found - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("room", [0, 100])
def test_no_tensor_as_large_as_the_rows_gradients_is_there(room):
    """At no time do as many numbers of a weight's shape exist as the rows' gradients hold."""
    model = build("llama")
    losses = OfRows(model, FORGET, samples([6] * 12, 5, 2), retain_weight=0.0)
    largest = max(model.parameters(), key=lambda p: p.numel())
    rule = OrthoGrad(room=room)
    there = {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}  # other tests' too
    shaped = []

    def count(*_):
        shaped.append(
            sum(
                x.numel()
                for x in gc.get_objects()
                if type(x) is torch.Tensor
                and id(x) not in there
                and x.shape[-2:] == largest.shape
                and x is not largest.grad
            )
        )

    handle = largest.register_post_accumulate_grad_hook(count)
    Updater(rule, model).update(losses)
    handle.remove()
    assert shaped and max(shaped) <= 2 * largest.numel()


def test_a_rule_without_retain_rows_is_refused():
    model = build("llama")
    with pytest.raises(InputError, match="no retain rows, whose gradients it needs; give some"):
        Updater(OrthoGrad(), model).update(OfRows(model, FORGET, []))
    assert all(p.grad is None for p in model.parameters())


def test_more_rows_than_memory_for_their_products_are_refused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr("geffect_fast.updates.retain_rows.free_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"products of 7 retain rows take .*; use fewer"):
        Updater(OrthoGrad(), model).update(OfRows(model, FORGET, RETAIN))


def test_dropout_is_in_the_forget_pass_alone():
    """Rows are protected for the model without dropout, and its modules are as before."""
    model = with_dropout(build("gpt2", torch.float64), 0.3)
    explicit = Explicit(model, FORGET, RETAIN, 0.0)
    rows = explicit.rows()
    model.train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    f = explicit.f()
    torch.manual_seed(5)
    found = updated(model, OfRows(model, FORGET, RETAIN, retain_weight=0.0))
    q = basis(rows)
    torch.testing.assert_close(found, f - q @ (q.T @ f), rtol=1e-6, atol=1e-9)
    assert [module.training for module in model.modules()] == modes


def test_rows_of_several_batches_and_a_module_without_factors_are_refused():
    """A module of the generic rule is run again for its rows, but not beside another batch."""
    model = build("llama")
    inner = model.model.layers[0].mlp.up_proj
    inner.forward = lambda x: torch.nn.functional.linear(x, inner.weight.clone())
    with pytest.raises(UnsupportedModelError, match=r"takes the generic rule.*fit one"):
        Updater(OrthoGrad(), model).update(OfRows(model, FORGET, RETAIN, size=2))
    same = OfRows(model, FORGET, RETAIN[:3], retain_weight=0.0)
    expected = Explicit(model, FORGET, RETAIN[:3], 0.0).orthograd(None)
    torch.testing.assert_close(updated(model, same), expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_told_by_its_row():
    model = build("llama")

    class Broken(OfRows):
        def retain_batches(self):
            batches = super().retain_batches()
            object.__setattr__(batches[1], "n_labels", 0)
            return batches

    with pytest.raises(NonFiniteError, match="retain row 3 of the update are not finite"):
        Updater(OrthoGrad(), model).update(Broken(model, FORGET, RETAIN))


def test_gradients_that_are_there_already_are_refused():
    model = build("llama")
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with pytest.raises(InputError, match=r"has a gradient already.*zero_grad\(\) first"):
        Updater(OrthoGrad(), model).update(OfRows(model, FORGET, RETAIN))


def test_the_basis_is_one():
    """The test's own reference is orthonormal, and has the rank of the rows."""
    model = build("llama", torch.float64)
    q = basis(Explicit(model, FORGET, REPEATED).rows())
    assert q.shape[1] == 5
    torch.testing.assert_close(q.T @ q, torch.eye(5, dtype=q.dtype), rtol=0, atol=1e-12)

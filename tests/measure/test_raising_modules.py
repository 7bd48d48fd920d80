"""Modules that raise in a trial: another way serves them, or both commands refuse them by name."""

from __future__ import annotations

import pytest
import torch
from architectures import VOCAB
from engines.small_models import Answer, ready
from models import samples
from torch import nn
from torch.autograd import forward_ad

import geffect_fast as gf
from geffect_fast.capture.inputs import REPLAYING
from geffect_fast.capture.probing import embedding_scale, is_linear, norm_offset
from geffect_fast.errors import UnsupportedModelError
from geffect_fast.trying import Trying

WIDTH = 8
KINDS = (
    *(TypeError, AttributeError, ValueError, AssertionError, KeyError, ZeroDivisionError),
    *(NotImplementedError, RuntimeError, StopIteration),
)
WITHOUT = (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt)


class Scaled(nn.Module):
    """A module that only the generic rule serves."""

    def __init__(self, kind, where):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, WIDTH))
        self.kind, self.where = kind, where

    def forward(self, x):
        dual = isinstance(self.weight, torch.Tensor) and (
            forward_ad._current_level >= 0
            and forward_ad.unpack_dual(self.weight).tangent is not None
        )
        if {"forward mode": dual, "replay": REPLAYING.get()}[self.where]:
            raise self.kind("no way\nof doing this")
        return x * self.weight[0] + x.tanh() * self.weight[1]


def made_up(kind):
    """Modules of types with a rule of their own, which refuse the inputs of the rule's trial."""

    def refuse(x):
        if (x.dim() == 3 and x.shape[:2] == (2, 3)) or x.shape == (8,):
            raise kind("no way\nof doing this")

    class Linear(nn.Linear):
        def forward(self, x):
            refuse(x)
            return super().forward(x)

    class Norm(nn.LayerNorm):
        def forward(self, x):
            refuse(x)
            return super().forward(x)

    class Table(nn.Embedding):
        def forward(self, ids):
            refuse(ids)
            return super().forward(ids)

    return Linear(WIDTH, WIDTH), Norm(WIDTH), Table(VOCAB, WIDTH)


class Model(nn.Module):
    def __init__(self, kind, where):
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        if where == "made-up input":
            self.inner, self.norm, self.embed = made_up(kind)
        else:
            self.scaled = Scaled(kind, where)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        x = self.norm(x + self.inner(x).cumsum(1).tanh())
        return Answer(self.head(self.scaled(x) if hasattr(self, "scaled") else x))


def rows(n):
    return samples([4, 5, 4, 4, 5, 4][:n], 1)


def both(model, n):
    """The result of the profile and of the check, or the refusal."""
    for run in (
        lambda: gf.profile(
            model, None, forget=rows(n), retain=rows(n), objectives=["ga", "npo"], engine="reverse"
        ),
        lambda: gf.check(model, None, data=rows(n), samples=n),
    ):
        try:
            yield run(), None
        except UnsupportedModelError as error:
            yield None, str(error)


every_kind = pytest.mark.parametrize(
    ("kind", "n"),
    [(KINDS[0], 1), *((kind, 3) for kind in KINDS), (KINDS[-1], 6)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)


@every_kind
@pytest.mark.parametrize("where", ["forward mode", "made-up input"])
def test_another_way_serves_it(where, kind, n):
    (_, of_profile), (checked, of_check) = both(ready(lambda: Model(kind, where)), n)
    assert of_profile is None and of_check is None
    assert checked.exact


@every_kind
def test_without_another_way_it_is_refused_by_name(kind, n):
    refused = {message for _, message in both(ready(lambda: Model(kind, "replay")), n)}
    (line,) = refused
    assert line.startswith("module 'scaled' cannot be run again on the same input (")
    assert kind.__name__ in line and "no way" in line and "\n" not in line


class Broken(Model):
    """A module that raises at every call."""

    def __init__(self, kind):
        super().__init__(kind, "forward mode")
        self.kind = kind

    def forward(self, input_ids):
        raise self.kind("no way\nof doing this")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_that_does_not_run_is_refused_by_name(kind):
    refused = {message for _, message in both(ready(lambda: Broken(kind)), 3)}
    (line,) = refused
    assert line.startswith("Broken: it cannot be profiled on a sequence of 7 tokens by itself (")
    assert kind.__name__ in line and "no way" in line and "\n" not in line


@pytest.mark.parametrize("kind", WITHOUT, ids=lambda kind: kind.__name__)
def test_a_lack_of_memory_and_an_interrupt_pass(kind):
    linear, norm, table = made_up(kind)
    for trial in (lambda: is_linear(linear), lambda: norm_offset(norm)):
        with pytest.raises(kind):
            trial()
    with pytest.raises(kind):
        embedding_scale(table)
    with pytest.raises(kind), Trying():
        raise kind("no way")


def test_reasons_are_one_line():
    for error, reason in (
        (KeyError(), "KeyError()"),
        (ValueError("a\nb"), "ValueError: a"),
        (TypeError(" x " * 100), f"TypeError: {(' x ' * 100).strip()[:160]}"),
    ):
        with Trying() as trial:
            raise error
        assert trial.reason == reason

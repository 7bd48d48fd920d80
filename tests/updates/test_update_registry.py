"""Update rules by name: strings, parameters, registration, and the page on one's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from explicit import Explicit, OfRows, cosine, flat, trained
from models import build, samples

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.updates import Updater, UpdateRule, available, parse, register
from geffect_fast.updates.registry import UPDATE_RULES

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_update_rule.md"


@pytest.fixture
def own_names(monkeypatch):
    """Remove the rules that a test registers when it ends."""
    monkeypatch.setattr(UPDATE_RULES, "classes", dict(UPDATE_RULES.classes))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("sgd", "sgd"),
        ("OrthoGrad", "orthograd"),
        ("orthograd(1e-4)", "orthograd(rank_tol=0.0001)"),
        (" pcgrad( both = TRUE , by_tensor=false)", "pcgrad(by_tensor=false, both=true)"),
        ("sam(penalty=.5, draws=3)", "sam(draws=3, penalty=0.5)"),
    ],
)
def test_strings(text, canonical):
    rule = parse(text)
    assert str(rule) == canonical
    assert parse(canonical) == rule
    assert parse(rule) is rule


def test_a_rule_in_python_is_that_of_its_string():
    assert gf.updates.OrthoGrad(rank_tol=1e-4) == parse("orthograd(rank_tol=1e-4)")
    assert gf.updates.GRU() == parse("gru(gamma=0.8)")


@pytest.mark.parametrize("tolerance", [0, 1, -1e-3, 2.0, float("nan"), True, "1e-3"])
def test_a_tolerance_lies_between_0_and_1(tolerance):
    with pytest.raises(InputError, match="update orthograd: rank_tol must be a finite number abov"):
        gf.updates.OrthoGrad(rank_tol=tolerance)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "update string '' is empty; write a name such as 'orthograd'"),
        (None, "update None must be a string or an UpdateRule"),
        (gf.updates.GRU, "must be a string or an UpdateRule; write GRU()"),
        ("grü", "unexpected 'ü'"),
        ("gruu", "unknown update 'gruu'; did you mean 'gru'?"),
        ("gru(gama=1)", "update gru has no parameter 'gama'; did you mean 'gamma'?"),
        ("gru(1, 2)", "too many arguments: gru takes (gamma)"),
        ("0.5*gru", "unexpected '0.5'"),
    ],
)
def test_what_is_wrong_is_told(text, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse(text)


class TestRegistering:
    def test_an_unusable_name(self):
        with pytest.raises(InputError, match="must be a lower-case identifier"):
            register("two words")

    def test_a_name_that_is_taken(self):
        class Other(UpdateRule):
            def apply(self, step):
                raise AssertionError

        taken = "update name 'gru' is taken by geffect_fast.updates.conflict.GRU"
        with pytest.raises(InputError, match=taken):
            register("gru")(Other)

    def test_a_class_that_is_no_rule(self):
        with pytest.raises(InputError, match="must be a subclass of UpdateRule"):
            register("mine")(dict)

    def test_a_rule_that_does_nothing(self):
        with pytest.raises(InputError, match=r"Empty must define apply\(\)"):
            register("mine")(type("Empty", (UpdateRule,), {}))

    def test_a_parameter_of_another_kind(self):
        @dataclass(frozen=True)
        class Wordy(UpdateRule):
            word: str = ""

            def apply(self, step):
                raise AssertionError

        with pytest.raises(InputError, match="parameter 'word' must be annotated float, int or"):
            register("mine")(Wordy)


def test_the_page_on_ones_own_rule_is_right(own_names):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {"__name__": "adding_an_update_rule"}
    exec(compile("\n".join(blocks), str(PAGE), "exec", dont_inherit=True), namespace)
    assert "gated" in available()
    model = build("llama", torch.float64)
    forget = samples([7, 12], 1, 2)
    retain = [{key: row[2:8] for key, row in forget[1].items()}]
    explicit = Explicit(model, forget, retain)
    f, r = explicit.f(), explicit.rows().sum(0)
    assert -0.2 < cosine(f, r) < 0
    for text, expected in (("gated", f + r), ("gated(least=0)", r)):
        Updater(parse(text), model).update(OfRows(model, forget, retain))
        found = flat([p.grad for p in trained(model)], trained(model))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        model.zero_grad()


def test_the_page_lists_every_rule_and_parameter():
    page = (PAGE.parent / "guide" / "updates.md").read_text(encoding="utf-8")
    table = page.split("| rule |")[1].split("\n## ")[0]
    for name in available():
        row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
        for parameter in parse(name).parameters():
            assert f"`{parameter}" in row, (name, parameter)

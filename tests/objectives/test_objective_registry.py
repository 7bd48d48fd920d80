"""Registering one's own objectives, and the page that explains how."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from geffect_fast.errors import InputError
from geffect_fast.objectives import (
    GA,
    KL,
    NPO,
    Composite,
    Objective,
    available,
    parameter,
    parse,
    register,
)
from geffect_fast.objectives.registry import OBJECTIVES

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_objective.md"


@pytest.fixture(autouse=True)
def fresh_names(monkeypatch):
    """Remove the names that a test registers when it ends."""
    monkeypatch.setattr(OBJECTIVES, "classes", dict(OBJECTIVES.classes))


def test_built_in_names():
    assert available() == (
        "altpo",
        "ceu",
        "dpo",
        "ga",
        "gd",
        "kl",
        "nll",
        "npo",
        "pdu",
        "po",
        "rmu",
        "rmu_mask",
        "rr",
        "satimp",
        "simnpo",
        "tnpo",
        "token_weights",
        "undial",
        "wga",
        "wtnpo",
    )


def test_a_registered_class_works_in_strings():
    @register("mine")
    @dataclass(frozen=True)
    class Mine(GA):
        eps: float
        power: int = parameter(2, at_least=1, at_most=4)
        flag: bool = False

    assert "mine" in available()
    assert parse("0.5*mine(0.1, flag=true) + kl") == 0.5 * Mine(0.1, flag=True) + KL()
    assert str(Mine(eps=1)) == "mine(eps=1)"
    assert [Mine(1, power=bound).power for bound in (1, 4)] == [1, 4]
    for bad, says in {
        "mine": "objective mine needs a value for eps",
        "mine(1, 5)": "mine: power must be a 64-bit integer at least 1 and at most 4, got 5",
        "mine(1, below=2)": "has no parameter 'below'",
        "mnie(1)": "did you mean 'mine'",
    }.items():
        with pytest.raises(InputError, match=says) as error:
            parse(bad)
        assert "\n" not in str(error.value)


def test_the_dataclass_decorator_may_be_left_out():
    @register("mine")
    class Mine(GA):
        eps: float = parameter(0.5, above=0, below=1)

    assert parse("mine(0.25)") == Mine(eps=0.25)
    assert str(Mine(0.25)) == "mine(eps=0.25)"
    assert hash(Mine(0.5)) == hash(Mine())
    with pytest.raises(AttributeError):
        Mine().eps = 1
    with pytest.raises(InputError, match="eps must be a finite number above 0 and below 1, got 1"):
        Mine(1)


def test_the_same_definition_may_run_again_but_no_other_may_take_its_name():
    def define(default):
        @register("mine")
        class Mine(GA):
            eps: float = default

        return Mine

    define(0.5)
    assert define(0.7)() == parse("mine(0.7)")
    with pytest.raises(InputError, match=r"name 'mine' is taken by .*define\.<locals>\.Mine"):

        @register("mine")
        class Other(GA):
            pass

    with pytest.raises(
        InputError, match=r"'npo' is taken by geffect_fast\.objectives\.preference\.NPO"
    ):

        @register("npo")
        class Mine(GA):
            pass


@pytest.mark.parametrize("name", ["", "a b", "1a", "a-b", "Mine", "é", "true", "sum", "a\n", 3])
def test_unusable_names(name):
    with pytest.raises(InputError, match="must be a lower-case identifier"):
        register(name)


def test_classes_that_are_no_objectives():
    with pytest.raises(InputError, match="must be a subclass of Objective"):
        register("mine")(dict)
    with pytest.raises(InputError, match="must be a subclass of Objective"):
        register("mine")(GA())
    with pytest.raises(InputError, match=r"Mine must define loss\(\)"):

        @register("mine")
        class Mine(Objective):
            pass

    with pytest.raises(InputError, match=r"Half must define token_terms\(\)"):

        @register("mine")
        class Half(Objective):
            loss = GA.loss

    with pytest.raises(InputError, match=r"Total must define terms\(\)"):

        @register("mine")
        class Total(Composite):
            pass

    with pytest.raises(InputError, match="parameter 'eps' must be annotated float, int or bool"):

        @register("mine")
        class Listed(GA):
            eps: list[float] = parameter(())

    assert "mine" not in available()


def test_composites_flatten_to_elementary_objectives():
    @register("mine")
    class Mine(Composite):
        eps: float = 2.0
        seen: ClassVar[int] = 3

        def terms(self):
            return ((self.eps, parse("gd(gamma=3)")), (-1.0, NPO() + 4 * KL()))

    parts = (0.5 * Mine()).parts()
    assert [(c, o.name) for c, o in parts] == [
        (3.0, "ga"),
        (1.0, "nll"),
        (-0.5, "npo"),
        (-2.0, "kl"),
    ]
    assert str(0.5 * Mine(eps=1)) == "0.5*mine(eps=1)"


def test_an_unregistered_objective_goes_by_its_class_name():
    @dataclass(frozen=True)
    class Sharp(NPO):
        pass

    assert str(Sharp(beta=2)) == "Sharp(beta=2)"
    assert Sharp() != NPO()


def test_objectives_survive_a_process_boundary():
    text = "npo(beta=0.1) - 2*rmu(layer=3, normalize=true)"
    script = (
        "import pickle, sys; sys.stdout.write(str(pickle.loads(bytes.fromhex(sys.stdin.read()))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(parse(text)).hex(),
        capture_output=True,
        text=True,
        check=True,
        cwd=PAGE.parents[1],
    )
    assert done.stdout == text


def test_the_parser_library_is_loaded_at_the_first_string_only():
    script = (
        "import sys, geffect_fast.objectives as o; assert 'lark' not in sys.modules; "
        "o.parse('ga'); assert 'lark' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PAGE.parents[1])


def test_the_page_runs_as_written():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    namespace = {"__name__": "adding_an_objective"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    assert {"capped", "npo_kl"} <= set(available())
    with pytest.raises(InputError, match="capped: ceiling must be a finite number above 0"):
        parse("capped(ceiling=-1)")

"""Sweeps: the meaning of ranges in objective strings; bad ranges are in `bad_input`."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from geffect_fast.errors import InputError
from geffect_fast.objectives import GA, NPO, RMU, WGA, parse, parse_list
from geffect_fast.objectives.parse import _GRAMMAR
from geffect_fast.objectives.ranges import MAX_OBJECTIVES, expand, expand_list

GOOD = {
    # text: (names, log, members)
    "wga(alpha=1:2:3)": (("alpha",), (False,), ["wga(alpha=1)", "wga(alpha=1.5)", "wga(alpha=2)"]),
    "wga( 1 : 2 : 2 )": (("alpha",), (False,), ["wga(alpha=1)", "wga(alpha=2)"]),
    "WGA(+1:-+-2:2)": (("alpha",), (False,), ["wga(alpha=1)", "wga(alpha=2)"]),
    "wga(0.1:7:30)": (
        ("alpha",),
        (False,),
        [f"wga(alpha={0.1 + 6.9 * i / 29:.6g})" for i in range(30)],
    ),
    "npo(beta=0.01:1:3,log)": (
        ("beta",),
        (True,),
        ["npo(beta=0.01)", "npo(beta=0.1)", "npo(beta=1)"],
    ),
    "simnpo(delta=-1:1:3)": (
        ("delta",),
        (False,),
        ["simnpo(delta=-1)", "simnpo(delta=0)", "simnpo(delta=1)"],
    ),
    "wga(3:3:1)": (("alpha",), (False,), ["wga(alpha=3)"]),
    "wga(3:3:5, LOG)": (("alpha",), (True,), ["wga(alpha=3)"]),
    "rmu(layer=1:3:3)": (("layer",), (False,), [f"rmu(layer={i})" for i in (1, 2, 3)]),
    "ceu(1:100:3,log)": (("skip",), (True,), [f"ceu(skip={i})" for i in (1, 10, 100)]),
    f"rmu(layer=0, seed={2**62}:{2**62 + 2}:3)": (
        ("seed",),
        (False,),
        [f"rmu(layer=0, seed={2**62 + i})" for i in range(3)],
    ),
    "wtnpo(1:2:2, 3:4:2)": (
        ("beta", "alpha"),
        (False, False),
        [f"wtnpo(beta={b}, alpha={a})" for b in (1, 2) for a in (3, 4)],
    ),
    "wtnpo(beta=1:10:2,log, alpha=3:4:2)": (
        ("beta", "alpha"),
        (True, False),
        [f"wtnpo(beta={b}, alpha={a})" for b in (1, 10) for a in (3, 4)],
    ),
    "npo(beta=0.1:1:2) + 0.5*kl": (
        ("beta",),
        (False,),
        ["npo(beta=0.1) + 0.5*kl", "npo(beta=1) + 0.5*kl"],
    ),
    "-2*(ga - npo(1:2:2))": (
        ("beta",),
        (False,),
        ["-2*ga + 2*npo(beta=1)", "-2*ga + 2*npo(beta=2)"],
    ),
    # coefficients
    "ga + 0.5:1:2*nll": (("nll_coefficient",), (False,), ["ga + 0.5*nll", "ga + nll"]),
    "ga - (1:100:3,log)*nll": (
        ("nll_coefficient",),
        (True,),
        ["ga - nll", "ga - 10*nll", "ga - 100*nll"],
    ),
    "(2:3:2)*(ga + nll)": (
        ("ga_coefficient",),
        (False,),
        ["2*ga + 2*nll", "3*ga + 3*nll"],
    ),
    "2*(2:3:2*ga) + 1:2:2*-nll*3": (
        ("ga_coefficient", "nll_coefficient"),
        (False, False),
        [f"{c}*ga - {d}*nll" for c in (4, 6) for d in (3, 6)],
    ),
    "2:3:2*(4:5:2*ga + nll)": (
        ("ga_coefficient", "ga_coefficient_2"),
        (False, False),
        [f"{c * d}*ga + {c}*nll" for c in (2, 3) for d in (4, 5)],
    ),
    "2:3:2*npo(1:2:2)": (
        ("npo_coefficient", "beta"),
        (False, False),
        [f"{c}*npo(beta={b})" for c in (2, 3) for b in (1, 2)],
    ),
    # one name, several ranges
    "npo(1:2:2) + wtnpo(3:4:2)": (
        ("npo_beta", "wtnpo_beta"),
        (False, False),
        [f"npo(beta={a}) + wtnpo(beta={b})" for a in (1, 2) for b in (3, 4)],
    ),
    "npo(1:2:2) + npo(3:4:2)": (
        ("npo_beta", "npo_beta_2"),
        (False, False),
        [f"npo(beta={a}) + npo(beta={b})" for a in (1, 2) for b in (3, 4)],
    ),
    # none
    " NPO( 1e-1 )": ((), (), ["npo(beta=0.1)"]),
}


@pytest.mark.parametrize("text", GOOD)
def test_a_sweep_is_its_objectives(text):
    names, log, members = GOOD[text]
    sweep = expand(text)
    assert (sweep.names, sweep.log) == (names, log)
    assert [str(objective) for _, objective in sweep.members] == members
    for values, objective in sweep.members:
        assert len(values) == len(names)
        assert objective == parse(str(objective))
    assert expand(sweep.text) == sweep


def test_the_text_stays_as_written_and_is_canonical_without_a_range():
    assert expand(" wga( alpha = 0.10:7:30 )").text == "wga( alpha = 0.10:7:30 )"
    assert expand("npo(1e-1)").text == "npo(beta=0.1)"
    assert expand(NPO(0.1) + GA()).text == "npo(beta=0.1) + ga"


def test_a_list_is_split_where_no_bracket_is_open():
    listed = expand_list("npo(beta=1:10:2,log) , ga,\nwtnpo(1:2:2, 3) + (1:2:2,log)*kl")
    assert [sweep.text for sweep in listed] == [
        "npo(beta=1:10:2,log)",
        "ga",
        "wtnpo(1:2:2, 3) + (1:2:2,log)*kl",
    ]
    assert expand_list(["ga,npo", WGA(1)]) == expand_list("ga,npo,wga(1)")


def test_values_are_those_that_labels_say():
    """Values are rounded to 6 digits, and the rounded value is used."""
    for values, objective in expand("wga(alpha=0.1:7:30)").members:
        assert objective == WGA(alpha=values[0])
        assert str(objective) == f"wga(alpha={values[0]:.6g})"
    assert expand("wga(alpha=0.1:7:30)").members[1][0] == (0.337931,)
    assert expand("rmu(layer=1:3:2)").members[0] == ((1,), RMU(layer=1))


ends = st.floats(min_value=1e-3, max_value=1e3)


@settings(max_examples=100, deadline=None)
@given(ends, ends, st.integers(2, 40), st.booleans())
def test_values_are_evenly_spaced_between_the_ends(a, b, count, log):
    start, stop = sorted((float(f"{a:.6g}"), float(f"{a + b:.6g}")))
    assume(stop > 1.01 * start)
    (sweep,) = expand_list(f"wga({start!r}:{stop!r}:{count}{',log' * log})")
    values = [value for (value,), _ in sweep.members]
    assert values[0] == start and values[-1] == stop
    exact = [start + (stop - start) * i / (count - 1) for i in range(count)]
    if log:
        exact = [start * (stop / start) ** (i / (count - 1)) for i in range(count)]
    for value, x in zip(values, exact, strict=True):
        assert math.isclose(value, x, rel_tol=5.001e-6)  # half a unit of the sixth digit


def test_ten_thousand_objectives_are_the_most():
    assert len(expand(f"wga(0:1:{MAX_OBJECTIVES})").members) == MAX_OBJECTIVES
    for text in ("wga(0:1:10001)", "wtnpo(1:2:101, 0:1:100)", "wga(0:1:10000),ga", "wga(0:1:9e99)"):
        with pytest.raises(InputError, match="brings the number of objectives above 10000"):
            expand_list(text)


def test_one_objective_is_no_list():
    with pytest.raises(InputError, match="'ga,npo' is a list; give one objective"):
        expand("ga,npo")


@pytest.mark.parametrize("read", [parse, parse_list])
def test_ranges_belong_to_sweeps(read):
    for text in ("wga(1:2:3)", "ga + 0.1:2:3*nll", "ga + npo(beta=0.1:1:3,log)"):
        with pytest.raises(InputError, match=r"range \S+ belongs to a sweep.*give one value"):
            read(text)


def test_the_grammar_is_without_ambiguity(caplog):
    """Where a token leaves two ways to parse, lark takes one and says so in its log only."""
    from lark import Lark, logger

    def complaints(grammar):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger=logger.name):
            Lark(grammar, parser="lalr", start=["one", "many"], debug=True)
        return [record for record in caplog.records if "conflict" in record.getMessage()]

    logger.addHandler(caplog.handler)
    try:
        assert not complaints(_GRAMMAR)
        assert complaints('many: one\none: one "+" one | "a"')
    finally:
        logger.removeHandler(caplog.handler)

"""Objective strings: their meaning, their canonical form, and the messages about bad ones."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
from hypothesis import given, settings
from objective_strategies import OBJECTIVES

from geffect_fast.errors import InputError
from geffect_fast.objectives import (
    CEU,
    DPO,
    GA,
    GD,
    KL,
    NLL,
    NPO,
    PDU,
    PO,
    RMU,
    RR,
    TNPO,
    UNDIAL,
    WGA,
    WTNPO,
    AltPO,
    RMUMask,
    SatImp,
    SimNPO,
    parse,
    parse_list,
    resolve,
)

GOOD = {
    # text: (objective, canonical string)
    "ga": (GA(), "ga"),
    " ga\n": (GA(), "ga"),
    "ga()": (GA(), "ga"),
    "GA": (GA(), "ga"),
    "npo": (NPO(), "npo"),
    "npo( 0.1 )": (NPO(0.1), "npo(beta=0.1)"),
    "npo(beta = 1e-1)": (NPO(0.1), "npo(beta=0.1)"),
    "NPO(beta=0.1)": (NPO(0.1), "npo(beta=0.1)"),
    "npo(1.0)": (NPO(1), "npo(beta=1)"),
    "npo(.5)": (NPO(0.5), "npo(beta=0.5)"),
    "npo(5.)": (NPO(5), "npo(beta=5)"),
    "npo(+5)": (NPO(5), "npo(beta=5)"),
    "npo(1E-3)": (NPO(0.001), "npo(beta=0.001)"),
    "npo(1e-7)": (NPO(1e-7), "npo(beta=1e-07)"),
    "npo(2.5e+20)": (NPO(2.5e20), "npo(beta=2.5e+20)"),
    "npo(0.10000000000000000000)": (NPO(0.1), "npo(beta=0.1)"),
    "npo(000001)": (NPO(1), "npo(beta=1)"),
    "wga(0)": (WGA(0.0), "wga(alpha=0)"),
    "wga(-0.0)": (WGA(0.0), "wga(alpha=0)"),
    "wtnpo(4, alpha=0.5)": (WTNPO(4, 0.5), "wtnpo(beta=4, alpha=0.5)"),
    "wtnpo(alpha=0.5,beta=4)": (WTNPO(4, 0.5), "wtnpo(beta=4, alpha=0.5)"),
    "wtnpo(alpha=0.5)": (WTNPO(alpha=0.5), "wtnpo(alpha=0.5)"),
    "simnpo(delta=-0.5)": (SimNPO(delta=-0.5), "simnpo(delta=-0.5)"),
    "simnpo(delta=--.5)": (SimNPO(delta=0.5), "simnpo(delta=0.5)"),
    "rmu(3,normalize=true)": (RMU(3, normalize=True), "rmu(layer=3, normalize=true)"),
    "rmu(3,20,False,7)": (RMU(3, 20, False, 7), "rmu(layer=3, c=20, normalize=false, seed=7)"),
    "gd": (GD(), "gd"),
    "gd(1, 2)": (GD(1, 2), "gd(gamma=1, alpha=2)"),
    "npo(beta=0.1) + 1.0*kl": (NPO(0.1) + KL(), "npo(beta=0.1) + kl"),
    "npo(beta=0.1)+kl": (NPO(0.1) + 1.0 * KL(), "npo(beta=0.1) + kl"),
    "1*ga": (GA(), "ga"),
    "(ga)": (GA(), "ga"),
    "((ga))*1": (GA(), "ga"),
    "- -ga": (GA(), "ga"),
    "-ga": (-GA(), "-ga"),
    "+ga": (GA(), "ga"),
    "-1*ga": (-GA(), "-ga"),
    "-0.5*ga": (-0.5 * GA(), "-0.5*ga"),
    "ga*-2": (-2 * GA(), "-2*ga"),
    "ga - 0.1*nll": (GA() - 0.1 * NLL(), "ga - 0.1*nll"),
    "ga + -0.1*nll": (GA() - 0.1 * NLL(), "ga - 0.1*nll"),
    "ga - -nll": (GA() + NLL(), "ga + nll"),
    "0.5*(ga + nll)": (0.5 * GA() + 0.5 * NLL(), "0.5*ga + 0.5*nll"),
    "(ga + nll)*0.5*4": (2 * (GA() + NLL()), "2*ga + 2*nll"),
    "2*3*ga": (6 * GA(), "6*ga"),
    "2*(ga - 3*(nll - kl))": (2 * GA() - 6 * NLL() + 6 * KL(), "2*ga - 6*nll + 6*kl"),
    "ga - (nll + kl)": (GA() - NLL() - KL(), "ga - nll - kl"),
    "0*ga": (0 * GA(), "0*ga"),
    "ga - 0*nll": (GA() - 0 * NLL(), "ga + 0*nll"),
    "gd(alpha=2) + kl": (GD(alpha=2) + KL(), "gd(alpha=2) + kl"),
    "ga + ga": (GA() + GA(), "ga + ga"),
    "1e-3*kl": (0.001 * KL(), "0.001*kl"),
    "po+dpo+tnpo": (PO() + DPO() + TNPO(), "po + dpo + tnpo"),
    "satimp(5, .1) + nll": (SatImp(5, 0.1) + NLL(), "satimp(beta1=5, beta2=0.1) + nll"),
    "satimp(beta2=1)": (SatImp(), "satimp(beta2=1)"),
    "ceu": (CEU(skip=1), "ceu"),
    "ceu(0)": (CEU(0), "ceu(skip=0)"),
    "undial(3)": (UNDIAL(3), "undial(beta=3)"),
    "altpo(.2, alpha=2)": (AltPO(0.2, 2), "altpo(beta=0.2, alpha=2)"),
    "pdu(eps=0.3)": (PDU(eps=0.3), "pdu(eps=0.3)"),
    "pdu(2, 0.3, 5)": (PDU(2, 0.3, 5), "pdu(gamma=2, eps=0.3, step=5)"),
    "pdu(1, 0.3, dual=0)": (PDU(1, 0.3, 1, 0), "pdu(gamma=1, eps=0.3, dual=0)"),
    "rmu_mask(3, 4)": (RMUMask(layer=3, seed=4), "rmu_mask(layer=3, seed=4)"),
    "rmu(3) + 100*rr(3)": (RMU(3) + 100 * RR(3), "rmu(layer=3) + 100*rr(layer=3)"),
}

BAD = {
    # text: (the message, the character that it points to)
    "npoo": (r"unknown objective 'npoo'; did you mean 'npo'\?", 1),
    "ga + wgaa(1)": (r"unknown objective 'wgaa'; did you mean 'wga'\?", 6),
    "simnop": ("did you mean 'simnpo'", 1),
    "zzz": ("unknown objective 'zzz'; known: altpo, ceu, dpo, ga", 1),
    "__import__": ("unknown objective '__import__'", 1),
    "npo(bta=1)": ("npo has no parameter 'bta'; did you mean 'beta'", 5),
    "rmu(1, sead=2)": ("did you mean 'seed'", 8),
    "ga(alpha=1)": ("ga has no parameter 'alpha'; there are none", 4),
    "npo(1, 2)": (r"too many arguments: npo takes \(beta\)", 8),
    "ga(1)": ("too many arguments: ga takes no parameters", 4),
    "npo(1, beta=2)": ("beta is given twice", 8),
    "npo(beta=1, beta=1)": ("beta is given twice", 13),
    "wtnpo(beta=1, 2)": ("positional argument after a named one", 15),
    "npo(0)": ("npo: beta must be a finite number above 0, got 0", 1),
    "ga + npo(-1)": ("beta must be a finite number above 0, got -1", 6),
    "wga(alpha=-0.1)": ("wga: alpha must be a finite number at least 0, got -0.1", 1),
    "npo(true)": ("beta must be a finite number above 0, got True", 1),
    "npo(beta)": ("expected a number, true or false, not 'beta'", 5),
    "npo(beta=ga)": ("expected a number, true or false, not 'ga'", 10),
    "npo(nan)": ("expected a number", 5),
    "npo(inf)": ("expected a number", 5),
    "npo(1e999)": ("number '1e999' is too long or out of range", 5),
    "rmu(layer=1.5)": ("layer must be a 64-bit integer at least 0, got 1.5", 1),
    "rmu(layer=-1)": ("layer must be a 64-bit integer at least 0, got -1", 1),
    "rmu(seed=9223372036854775808)": ("seed must be a 64-bit integer", 1),
    "rmu(normalize=1)": ("normalize must be true or false, got 1", 1),
    "satimp(-1)": ("satimp: beta1 must be a finite number at least 0, got -1", 1),
    "satimp(1, beta2=-1)": ("satimp: beta2 must be a finite number at least 0, got -1", 1),
    "undial(-1)": ("undial: beta must be a finite number at least 0, got -1", 1),
    "ceu(-1)": ("ceu: skip must be a 64-bit integer at least 0, got -1", 1),
    "ceu(0.5)": ("ceu: skip must be a 64-bit integer at least 0, got 0.5", 1),
    "altpo(0)": ("altpo: beta must be a finite number above 0, got 0", 1),
    "ga + pdu": ("objective pdu needs a value for eps", 6),
    "pdu(2)": ("objective pdu needs a value for eps", 1),
    "pdu(eps=-1)": ("pdu: eps must be a finite number at least 0, got -1", 1),
    "pdu(eps=1, dual=-1)": ("pdu: dual must be a finite number at least 0, got -1", 1),
    "rmu_mask(c=1)": ("rmu_mask has no parameter 'c'; known: layer, seed", 10),
    "rr(seed=1)": ("rr has no parameter 'seed'", 4),
    "rr(layer=-1)": ("rr: layer must be a 64-bit integer at least 0, got -1", 1),
    "npo(beta='1')": ('unexpected "\'"', 10),
    "npo(": ("unexpected end of the string, expected .*a number", 5),
    "npo(1": ("unexpected end of the string, expected", 6),
    "npo(1,)": (r"unexpected '\)', expected .*a number", 7),
    "npo)": (r"unexpected '\)', expected .*the end", 4),
    "(ga": ("unexpected end of the string", 4),
    "ga +": ("unexpected end of the string", 5),
    "ga nll": ("unexpected 'nll'", 4),
    "* ga": (r"unexpected '\*'", 1),
    "ga * nll": ("unexpected 'nll', expected .*a number", 6),
    "2": (r"unexpected end of the string, expected '\*'", 2),
    "2 + ga": (r"unexpected '\+', expected '\*'", 3),
    "ga / 2": ("unexpected '/'", 4),
    "ga; nll": ("unexpected ';'", 3),
    "ga,nll": ("unexpected ',', expected the end", 3),
    "npo(beta=1e)": ("unexpected 'e'", 11),
    "npo(٣)": ("unexpected '٣'", 5),
    "ga.__class__": (r"unexpected '\.'", 3),
    "ga\n+\nnpo(x)": ("expected a number", 10),
    "1e308*10*ga": ("coefficient out of range", 1),
    "lambda: ga": ("unexpected ':'", 7),
}


def one_line(error) -> str:
    message = str(error.value)
    assert message.splitlines() == [message]
    assert len(message) < 400
    return message


@pytest.mark.parametrize("text", GOOD)
def test_good_strings(text):
    objective, canonical = GOOD[text]
    found = parse(text)
    assert found == objective
    assert hash(found) == hash(objective)
    assert str(found) == canonical
    assert parse(canonical) == found
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize("text", BAD)
def test_bad_strings_get_one_line_with_the_place(text):
    says, position = BAD[text]
    with pytest.raises(InputError, match=says) as error:
        parse(text)
    message = one_line(error)
    assert message.endswith(f"(character {position} of {text!r})")


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_empty_strings(text):
    for read in (parse, parse_list):
        with pytest.raises(InputError, match="is empty"):
            read(text)


def test_lists_split_at_top_level_commas_only():
    found = parse_list("ga,wga(alpha=1),wtnpo(1, 2) , npo(beta=0.1) + 1.0*kl")
    assert found == [GA(), WGA(1), WTNPO(1, 2), NPO(0.1) + KL()]
    assert parse_list("ga") == [GA()]
    for bad in ("ga,", ",ga", "ga,,nll", "ga,npo(,)"):
        with pytest.raises(InputError, match="unexpected") as error:
            parse_list(bad)
        one_line(error)


def test_resolve_takes_objectives_and_strings():
    o = NPO()
    assert resolve(o) is o
    assert resolve("npo") == o
    for bad in (3, None, b"ga", ["ga"]):
        with pytest.raises(InputError, match="must be a string or an Objective"):
            resolve(bad)
    with pytest.raises(InputError, match=r"write NPO\(\)"):
        resolve(NPO)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 1_000_000,
        "(" * 9_999,
        "(" * 4_999 + "ga" + ")" * 4_999,
        "(" * 4_000 + "ga" + ")" * 4_000,
        "-" * 9_990 + "ga",
        "+".join(["ga"] * 3_000),
        "ga+(2*" * 900 + "ga" + ")" * 900,
        "2*" * 4_000 + "ga",
        "-(ga" * 1_900 + ")" * 1_900,
        "ga(" * 3_000,
        "rmu(" + "1," * 4_000 + "1)",
        "npo(" + "beta=1," * 1_000 + "beta=1)",
        "npo(" + "9" * 9_000 + ")",
        "npo(0." + "0" * 9_000 + "1)",
        "x" * 9_999,
        "ga," * 3_000 + "ga",
        "npo(" + "-" * 9_000 + "1)",
    ],
    ids=lambda text: text[:12],
)
def test_huge_strings_end_soon_and_calmly(text):
    begin = time.process_time()
    try:
        parse_list(text)
    except InputError as error:
        assert str(error).splitlines() == [str(error)]
        assert len(str(error)) < 400
    assert time.process_time() - begin < 30


def test_deep_groups_mean_what_they_say():
    assert parse("(" * 4_000 + "ga" + ")" * 4_000) == GA()
    assert parse("-(" * 3_001 + "ga + nll" + ")" * 3_001) == -GA() - NLL()
    assert len(parse("+".join(["ga"] * 3_000)).parts()) == 3_000


# ---- the canonical string ----


@settings(max_examples=300, deadline=None)
@given(OBJECTIVES)
def test_the_string_parses_back(o):
    again = parse(str(o))
    assert again == o
    assert hash(again) == hash(o)
    assert str(again) == str(o)
    assert again.parts() == o.parts()
    assert parse_list(f"{o},{o}") == [o, o]


@settings(max_examples=100, deadline=None)
@given(OBJECTIVES)
def test_copies_keep_value_and_spelling(o):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(o, protocol))
        assert again == o
        assert str(again) == str(o)
    again = copy.deepcopy(o)
    assert again == o
    assert str(again) == str(o)

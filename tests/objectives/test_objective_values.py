"""Objectives as Python objects: operators, parameters, and their checks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from geffect_fast.errors import InputError
from geffect_fast.objectives import (
    CEU,
    DPO,
    GA,
    GD,
    KL,
    NPO,
    PDU,
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
)


def test_spelling_is_kept_but_does_not_matter():
    assert str(NPO()) == "npo"
    assert str(NPO(0.1)) == str(NPO(beta=0.1)) == "npo(beta=0.1)"
    assert NPO() == NPO(0.1)
    assert len({NPO(), NPO(0.1), NPO(beta=0.1)}) == 1
    assert NPO() != NPO(0.2)
    assert TNPO(4) != NPO(4)
    assert repr(NPO()) == "NPO(beta=0.1)"
    assert NPO().parameters() == {"beta": 0.1}
    assert list(RMU(seed=3).parameters().items()) == [
        ("layer", 7),
        ("c", 2.0),
        ("normalize", False),
        ("seed", 3),
    ]
    assert (NPO() + 0.5 * KL()).parameters() == {
        "terms": [
            {"coefficient": 1.0, "name": "npo", "parameters": {"beta": 0.1}},
            {"coefficient": 0.5, "name": "kl", "parameters": {}},
        ]
    }


def test_defaults_are_the_published_ones():
    assert (WGA().alpha, NPO().beta, TNPO().beta, DPO().beta) == (1.0, 0.1, 4.0, 0.1)
    assert (WTNPO().beta, WTNPO().alpha) == (4.0, 1.5)
    assert (SimNPO().beta, SimNPO().delta) == (4.5, 0.0)
    assert (GD().gamma, GD().alpha) == (1.0, 1.0)
    assert RMU() == RMU(layer=7, c=2.0, normalize=False, seed=0)
    assert RMUMask() == RMUMask(layer=7, seed=0)
    assert RR() == RR(layer=7)
    assert SatImp() == SatImp(beta1=5, beta2=1)
    assert UNDIAL() == UNDIAL(beta=10)
    assert CEU() == CEU(skip=1)
    assert AltPO() == AltPO(beta=0.1, alpha=1)
    assert PDU(eps=0.5) == PDU(gamma=1, eps=0.5, step=1, dual=1)


def test_operators():
    o = NPO(beta=0.1) + 1.0 * KL()
    assert o.parts() == ((1.0, NPO(0.1)), (1.0, KL()))
    assert str(o) == "npo(beta=0.1) + kl"
    assert (2 * o).parts() == ((2.0, NPO(0.1)), (2.0, KL()))
    assert (o - GA() * 0.5).parts() == ((1.0, NPO(0.1)), (1.0, KL()), (-0.5, GA()))
    assert np.float64(2) * GA() == GA() * np.float32(2) == 2 * GA()
    assert isinstance((np.float64(2) * GA()).parts()[0][0], float)
    for coefficient in (math.nan, math.inf, "2", True, None, KL(), 10**400):
        with pytest.raises(InputError, match="coefficient of ga must be a finite number"):
            GA() * coefficient
    with pytest.raises(InputError, match="coefficient"):
        1e200 * (1e200 * GA())
    with pytest.raises(TypeError):
        GA() + 1
    with pytest.raises(TypeError):
        GA() - "kl"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NPO(beta=-1), "objective npo: beta must be a finite number above 0, got -1"),
        (lambda: NPO(math.nan), "objective npo: beta must be a finite number above 0, got nan"),
        (lambda: NPO(math.inf), "objective npo: beta must be a finite number above 0, got inf"),
        (lambda: NPO(10**400), "beta must be a finite number above 0, got 1000"),
        (lambda: NPO("0.1"), "objective npo: beta must be a finite number above 0, got '0.1'"),
        (lambda: NPO(None), "beta must be a finite number above 0, got None"),
        (lambda: SimNPO(delta=True), "simnpo: delta must be a finite number, got True"),
        (lambda: GD(alpha=-1), "gd: alpha must be a finite number at least 0, got -1"),
        (lambda: RMU(layer=7.0), "rmu: layer must be a 64-bit integer at least 0, got 7.0"),
        (lambda: RMU(layer=True), "rmu: layer must be a 64-bit integer at least 0, got True"),
        (lambda: PDU(), "objective pdu needs a value for eps"),
        (lambda: PDU(1, "0.3"), "pdu: eps must be a finite number at least 0, got '0.3'"),
        (lambda: PDU(eps=1).updated(math.nan), "pdu: dual must be a finite number at least 0, got"),
        (lambda: PDU(eps=1).updated(math.inf), "pdu: dual must be a finite number at least 0, got"),
        (lambda: RMU(normalize=0), "rmu: normalize must be true or false, got 0"),
        (lambda: RMU(seed=2**63), "rmu: seed must be a 64-bit integer at least 0, got 9223"),
    ],
)
def test_parameters_are_checked_on_construction(make, says):
    with pytest.raises(InputError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_parameters_become_plain_numbers():
    assert type(NPO(np.float32(0.5)).beta) is float
    assert type(NPO(1).beta) is float
    assert type(RMU(np.int64(3)).layer) is int
    assert str(NPO(np.float64(0.5))) == "npo(beta=0.5)"

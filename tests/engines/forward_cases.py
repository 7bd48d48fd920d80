"""Data, objectives and calls that tests of the forward engine share."""

from __future__ import annotations

import numpy as np
from models import samples
from reference import n_labelled

import geffect_fast as gf


def rows():
    """Rows of many shapes for the forward engine.

    The first label of an answer is the first, second or third token. There are alternatives, two of
    them for one row, a label in the middle that is ignored, and weights.
    """
    forget = samples([7], 1, 0) + samples([2, 9], 2, 1) + samples([6], 3, 3)
    forget[2]["labels"][5] = -100
    alternatives = [[a] for a in samples([4, 5, 3, 6], 4, 1)]
    alternatives[0] += samples([3], 5, 0)
    for i, row in enumerate(forget):
        row["alternative"] = alternatives[i]
        row["weights"] = [(i + j) % 4 / 2 for j in range(n_labelled([row]))]
    return forget, samples([6], 6, 0) + samples([7], 7, 2), alternatives


FORGET, RETAIN, ALTERNATIVES = rows()

OBJECTIVES = {
    "ga": [(1.0, "ga", {})],
    "wga(alpha=1.5)": [(1.0, "wga", {"alpha": 1.5})],
    "token_weights": [(1.0, "token_weights", {})],
    "satimp(beta1=2, beta2=0.5)": [(1.0, "satimp", {"beta1": 2.0, "beta2": 0.5})],
    "npo(beta=0.5) + 2*kl": [(1.0, "npo", {"beta": 0.5}), (2.0, "kl", {})],
    "wtnpo(beta=3, alpha=0.5)": [(1.0, "wtnpo", {"beta": 3.0, "alpha": 0.5})],
    "simnpo(beta=2, delta=0.1) - 0.5*nll": [
        (1.0, "simnpo", {"beta": 2.0, "delta": 0.1}),
        (-0.5, "nll", {}),
    ],
    "po": [(1.0, "po", {})],
    "dpo(beta=0.5)": [(1.0, "dpo", {"beta": 0.5})],
    "ceu(skip=0)": [(1.0, "ceu", {"skip": 0})],
    "undial(beta=2)": [(1.0, "undial", {"beta": 2.0})],
    "pdu(gamma=0.5, eps=0.3, dual=2)": [(0.5, "flattening", {}), (2.0, "nll", {})],
    "rmu(layer=1, c=3)": [(1.0, "rmu", {"layer": 1, "c": 3.0, "seed": 0, "normalize": False})],
    "rmu_mask(layer=2) + rr(layer=2)": [
        (1.0, "rmu_mask", {"layer": 2, "seed": 0}),
        (1.0, "rr", {"layer": 2}),
    ],
}


def run(model, other=None, objectives=tuple(OBJECTIVES), resolve=("sample", "token"), **kwargs):
    settings = {"engine": "forward", "token_budget": 60} | kwargs
    return gf.profile(
        model,
        None,
        forget=FORGET,
        retain=RETAIN,
        objectives=list(objectives),
        reference_model=other,
        resolve=list(resolve),
        **settings,
    )


def close(found, expected, tolerance=1e-9):
    scale = float(np.abs(expected).max())
    assert scale > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)

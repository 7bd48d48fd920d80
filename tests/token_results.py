"""Results with a token axis, from given or drawn shares of every token."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

TEXTS = ("Mara", " Lund", " lives", " in", " Porto", ".")


def token_result(shares, others=None, *, retain=0, alternative=0, groups=0, reduction="token"):
    """A Dataset in the form of `geffect_fast.profile` by sample and token.

    Args:
        shares: for every forget row an array `(2, n_i)` of ga's `u` and `r`.
        others: factor of ga's effects for each further objective, by name.
        retain: number of retain rows, which have effects of their own.
        alternative: tokens of an alternative behind every answer, with effects other than ga's.
        groups: parts of the model that the effects are spread over; 0: no group axis.
    """
    factors = {"ga": 1.0} | (others or {})
    lengths = [share.shape[1] for share in shares]
    n, width = len(shares) + retain, max(lengths, default=0) + alternative
    effect = np.zeros((len(factors), 2, n, width))
    ids = np.full((n, width), -1)
    sequence = ids.copy()
    for i, (share, length) in enumerate(zip(shares, lengths, strict=True)):
        for k, factor in enumerate(factors.values()):
            effect[k, :, i, :length] = factor * np.asarray(share)
            effect[k, :, i, length : length + alternative] = 0 if k == 0 else -7.0
        ids[i, : length + alternative] = 5 + np.arange(length + alternative)
        sequence[i, :length] = 0
        sequence[i, length : length + alternative] = 1
    for i in range(len(shares), n):
        effect[:, :, i, :1] = 9.0
        ids[i, :1], sequence[i, :1] = 3, 0
    texts = np.array([*TEXTS, ""], dtype=object)[np.where(ids < 0, -1, ids % len(TEXTS))]
    dims, array = ["objective", "risk", "sample", "token"], effect
    coords = {
        "objective": list(factors),
        "risk": ["unlearn", "retain"],
        "sample": [*range(len(shares)), *range(retain)],
        "set": ("sample", ["forget"] * len(shares) + ["retain"] * retain),
        "question": ("sample", [f"Who is author {i}?" for i in range(n)]),
        "token": np.arange(width),
        "token_id": (("sample", "token"), ids),
        "token_text": (("sample", "token"), texts),
        "sequence": (("sample", "token"), sequence),
    }
    if groups:
        part = np.arange(1.0, groups + 1) / np.arange(1.0, groups + 1).sum()
        array = effect[:, :, None] * part[:, None, None]
        dims.insert(2, "group")
        coords["group"] = [f"part{g}" for g in range(groups)]
    return xr.Dataset(
        {
            "g_effect": (dims, array),
            "risk_value": ("risk", [2.0, 1.0]),
            "loss": ("objective", [-2.0] * len(factors)),
        },
        coords,
        {
            "engine": "forward",
            "reduction": reduction,
            "objectives": json.dumps([{"name": o, "parameters": {}} for o in factors]),
            "versions": json.dumps({"torch": "2.13.0"}),
        },
    )


def drawn_shares(lengths, seed=0):
    """Shares with typical signs: removal most often costs something."""
    rng = np.random.default_rng(seed)
    shares = []
    for length in lengths:
        u = -np.abs(rng.normal(size=length)) * np.exp(rng.normal(size=length)) * 1e-2
        r = 0.4 * u * rng.lognormal(size=length) + 2e-3 * rng.normal(size=length)
        u[rng.random(length) < 0.15] *= -0.3
        shares.append(np.stack([u, r]))
    return shares

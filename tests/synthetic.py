"""A result in the form of `geffect_fast.profile`, with numbers from a seed."""

import json

import numpy as np
import xarray as xr

KINDS = ("input_layernorm", "q_proj", "down_proj")
OBJECTIVES = (
    "ga",
    "wga(alpha=1)",
    "npo(beta=0.1)",
    "npo(beta=0.1) + kl",
    "wtnpo(beta=4, alpha=1.5)",
)

TOKENS = (
    *("[red]", " <script>alert(1)</script>", "[/]", "&amp;", "\"'", "\n", "\t", "\x1b[31m", "�"),
    *("<0xE2>", "", "  ", "\u202e", "日本", "<|end|>", "\\", " I", " do", " not", " know"),
)
"""Tokens that break naive pages and terminals. The last four belong to an alternative."""


def make_dataset(
    objectives=OBJECTIVES,
    risks=("unlearn", "retain"),
    n_blocks=4,
    n_forget=12,
    n_retain=3,
    seed=0,
    resolve=("parameter", "sample"),
):
    rng = np.random.default_rng(seed)
    names = ["model.embed_tokens.weight"]
    block, kind, group = [-1], ["embed_tokens"], ["embedding"]
    for b in range(n_blocks):
        for k in KINDS:
            names.append(f"model.layers.{b}.{k}.weight")
            block.append(b)
            kind.append(k)
            group.append(("shallow", "middle", "deep")[3 * b // n_blocks])
    names += ["model.norm.weight", "lm_head.weight"]
    block += [-1, -1]
    kind += ["norm", "lm_head"]
    group += ["final_norm", "lm_head"]
    n_samples = n_forget + n_retain
    shape = (len(objectives), len(risks), len(names), n_samples)
    effect = rng.normal(size=shape) * np.exp(rng.normal(size=(1, 1, len(names), 1))) * 1e-3
    effect *= np.logspace(0, 3, len(objectives))[:, None, None, None]
    effect[:, 0] = -np.abs(effect[:, 0])
    dims = ["objective", "risk", "parameter", "sample"]
    coords = {
        "objective": list(objectives),
        "risk": list(risks),
        "parameter": names,
        "block": ("parameter", block),
        "kind": ("parameter", kind),
        "group": ("parameter", group),
        "sample": list(range(n_forget)) + list(range(n_retain)),
        "set": ("sample", ["forget"] * n_forget + ["retain"] * n_retain),
        "question": (
            "sample",
            [f"What did the author number {i} write about the sea?" for i in range(n_samples)],
        ),
    }
    total = effect.sum((2, 3))
    dataset = xr.Dataset(
        {
            "g_effect": (dims, effect),
            "risk_value": ("risk", rng.random(len(risks))),
            "loss": ("objective", rng.normal(size=len(objectives))),
            "grad_norm": ("objective", np.abs(total).sum(1) + 1),
            "risk_grad_norm": ("risk", np.ones(len(risks))),
            "cosine": (["objective", "risk"], np.tanh(total)),
        },
        coords=coords,
        attrs={
            "engine": "reverse",
            "layout": "packed",
            "reduction": "token",
            "risk": "nll",
            "token_budget": 2048,
            "dtype": "float32",
            "n_forget": n_forget,
            "n_retain": n_retain,
            "objectives": json.dumps([{"name": o, "parameters": {}} for o in objectives]),
            "covered_parameters": len(names),
            "covered_elements": 12_345,
            "trainable_parameters": len(names),
            "trainable_elements": 12_345,
            "frozen_parameters": 2,
            "frozen_elements": 1_000,
            "tied": "[]",
            "coverage_checked": 1,
            "versions": json.dumps({"torch": "2.13.0"}),
            "created": "2024-01-01T00:00:00+00:00",
        },
    )
    if "position" in resolve:
        # Two thirds of every effect at the first token, the rest at the second; then padding.
        spread = xr.DataArray([2 / 3, 1 / 3, 0.0], {"position": [0, 1, 2]})
        dataset["g_effect"] = dataset["g_effect"] * spread
        ids = np.tile([7, 9, -1], (n_samples, 1))
        within = ("sample", "position")
        sequence = np.where(ids < 0, -1, 0)
        dataset = dataset.assign_coords(token_id=(within, ids), sequence=(within, sequence))
    if "token" in resolve:
        dataset = _with_tokens(dataset, rng)
    if "group" in resolve:
        left = dataset["g_effect"].groupby("group").sum().transpose(..., "group")
        order = ("objective", "risk", "group", "sample", "position", "token")
        left = left.transpose(*order, missing_dims="ignore")
        dataset = dataset.drop_dims("parameter").assign(g_effect=left)
    for dim in {"parameter", "sample"} - set(resolve):
        if dim in dataset.dims:
            left = dataset["g_effect"].sum(dim)
            dataset = dataset.drop_dims(dim).assign(g_effect=left)
    return dataset


def _with_tokens(dataset, rng):
    """Effects spread over `TOKENS`, of which sample `i` lacks the first `i % 7`."""
    n, width = dataset.sizes["sample"], len(TOKENS)
    share = np.zeros((*dataset["g_effect"].shape[:2], n, width))
    texts, ids = np.full((n, width), "", object), np.full((n, width), -1)
    sequence = ids.copy()
    for i in range(n):
        own = np.arange(i % 7, width)
        drawn = rng.normal(size=(*share.shape[:2], len(own)))
        drawn += (1 - drawn.sum(-1, keepdims=True)) / len(own)  # they add up
        share[:, :, i, : len(own)] = drawn
        texts[i, : len(own)] = np.array(TOKENS, object)[own]
        ids[i, : len(own)] = own + 100
        sequence[i, : len(own)] = own >= width - 4
    spread = xr.DataArray(share, dims=("objective", "risk", "sample", "token"))
    return dataset.assign(g_effect=dataset["g_effect"] * spread).assign_coords(
        token=np.arange(width),
        token_id=(("sample", "token"), ids),
        token_text=(("sample", "token"), texts),
        sequence=(("sample", "token"), sequence),
    )

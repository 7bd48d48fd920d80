"""Where a parameter sits in a model: its block, kind and group, read off its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

OUTSIDE = -1
"""Block of a parameter outside the stack of layers."""

THIRDS = ("shallow", "middle", "deep")
GROUPS = ("embedding", *THIRDS, "final_norm", "lm_head")
"""Parts of a model, front to back."""


_ADAPTER = re.compile(
    r"(?:\.token_adapter)?\.((?:lora|ia3|hada|lokr|vera|oft|boft|hra|road|vblora|fourierft|randlora"
    r"|ranknum|ln_tuning|trainable_tokens|modules_to_save)\w*)\.\w+?(\.weight|\.bias|)$"
)
"""How names in an adapter of peft end: what is learned, the adapter's name, the parameter."""


def block_of(name: str) -> int:
    """Index of the layer a parameter belongs to, `OUTSIDE` where it is in none.

    The first number in the dotted name: `model.layers.3.mlp.experts.5.w` is in block 3.
    """
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else OUTSIDE


def kind_of(name: str) -> str:
    """The short name of a parameter's module, `q_proj`; `q_proj.bias` for what is not a weight.

    What peft put beside a module is named with it, `q_proj.lora_A`, whatever the adapter's name.
    """
    adapted = _ADAPTER.search(name)
    if adapted:
        of = kind_of(name[: adapted.start()] + ".weight")
        return f"{of}.{adapted[1]}" + (adapted[2] if adapted[2] == ".bias" else "")
    *path, leaf = name.replace(".base_layer.", ".").split(".")
    module = next((part for part in reversed(path) if not part.isdigit()), "")
    if leaf == "weight" and module:
        return module
    return f"{module}.{leaf}" if module else leaf


def group_of(name: str, n_blocks: int) -> str:
    """`embedding`, a third of the blocks by depth, `final_norm` or `lm_head`."""
    block = block_of(name)
    if block != OUTSIDE:
        return THIRDS[min(3 * block // n_blocks, 2)]
    # LFM2's `embedding_norm` is its last norm, GPT-NeoX's `embed_out` its head.
    if re.search(r"emb(?!edding_norm|ed_out)|wte|wpe|project_in|per_layer", name):
        return "embedding"
    return "final_norm" if re.search(r"norm|ln_", name) else "lm_head"


def groups_of(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The groups of these parameters, front to back, and for each parameter its group's number."""
    n_blocks = max(map(block_of, names), default=OUTSIDE) + 1
    groups = [group_of(name, n_blocks) for name in names]
    present = [group for group in GROUPS if group in groups]
    return present, [present.index(group) for group in groups]


def parameter_coordinates(names: Sequence[str]) -> dict[str, Any]:
    """Coordinates of the parameter axis: `block`, `kind` and `group` of every name."""
    groups, members = groups_of(names)
    return {
        "parameter": list(names),
        "block": ("parameter", np.array([block_of(name) for name in names])),
        "kind": ("parameter", [kind_of(name) for name in names]),
        "group": ("parameter", [groups[g] for g in members]),
    }

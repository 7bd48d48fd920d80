"""The place of a parameter in a model: its block, kind and group, read off its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geffect_fast.errors import InputError

OUTSIDE = -1
"""Block of a parameter outside the stack of layers."""

THIRDS = ("shallow", "middle", "deep")
GROUPS = ("embedding", *THIRDS, "final_norm", "lm_head")
"""Parts of a model, front to back."""

Blocks = Mapping[str, frozenset[int]]
"""Groups of blocks by name, front to back, in place of thirds."""

OTHER = "other_blocks"
"""The group of blocks that are in none of the user's groups."""


_ADAPTER = re.compile(
    r"(?:\.token_adapter)?\.((?:lora|ia3|hada|lokr|vera|oft|boft|hra|road|vblora|fourierft|randlora"
    r"|ranknum|ln_tuning|trainable_tokens|modules_to_save)\w*)\.\w+?(\.weight|\.bias|)$"
)
"""End of a parameter's name in an adapter of peft: what is learned, adapter, parameter."""


def block_of(name: str) -> int:
    """Index of the block that holds a parameter; `OUTSIDE` where no block does.

    The index is the first number in the dotted name: `model.layers.3.mlp.experts.5.w` is in block
    3.
    """
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else OUTSIDE


def kind_of(name: str) -> str:
    """The short name of a parameter's module, `q_proj`; `q_proj.bias` where it is not a weight.

    A parameter of an adapter of peft is named with its module, `q_proj.lora_A`, without the
    adapter's name.
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
    """The group of a parameter: `embedding`, a third of the blocks, `final_norm` or `lm_head`."""
    block = block_of(name)
    if block != OUTSIDE:
        return THIRDS[min(3 * block // n_blocks, 2)]
    # LFM2's `embedding_norm` is its last norm, GPT-NeoX's `embed_out` its head.
    if re.search(r"emb(?!edding_norm|ed_out)|wte|wpe|project_in|per_layer", name):
        return "embedding"
    return "final_norm" if re.search(r"norm|ln_", name) else "lm_head"


def groups_of(names: Sequence[str], blocks: Blocks | None = None) -> tuple[list[str], list[int]]:
    """The groups of parameters, front to back, and for each parameter its group's number.

    Args:
        names: names of the parameters.
        blocks: groups of blocks by name, in place of the thirds.
    """
    n_blocks = _n_blocks(names)
    groups = [group_of(name, n_blocks) for name in names]
    order: Sequence[str] = GROUPS
    if blocks is not None:
        of = {block: group for group, own in blocks.items() for block in own}
        in_stack = [block_of(name) != OUTSIDE for name in names]
        groups = [
            of.get(block_of(name), OTHER) if inside else group
            for name, group, inside in zip(names, groups, in_stack, strict=True)
        ]
        order = (GROUPS[0], *blocks, OTHER, *GROUPS[-2:])
    present = [group for group in order if group in groups]
    return present, [present.index(group) for group in groups]


def checked_blocks(groups: object, names: Sequence[str]) -> Blocks | None:
    """Groups of blocks from the user's notation, checked; None where the user gave none.

    Args:
        groups: name to `"0-3"`, `"0-3,7"`, a number or numbers; None for thirds by depth.
        names: names of the trainable parameters.

    Raises:
        InputError: `groups` is not a mapping or is empty, a group's name is taken, blocks are
            not numbers or intervals, a group is empty, a block does not exist or has no
            trainable parameter, or a block is in two groups.
    """
    if groups is None:
        return None
    if not isinstance(groups, Mapping) or not groups:
        raise InputError(f"groups: got {groups!r}; give blocks by name, such as {{'first': '0-3'}}")
    known = {block_of(name) for name in names} - {OUTSIDE}
    there = f"the model has blocks {_written(known)}" if known else "the model has no blocks"
    blocks: dict[str, frozenset[int]] = {}
    for name, given in groups.items():
        if name in (*GROUPS, OTHER) and name not in THIRDS:
            raise InputError(
                f"groups: the name '{name}' is taken by parts outside of the blocks; choose another"
            )
        own = _numbers(str(name), given)
        if not own:
            raise InputError(f"groups: '{name}' is empty; {there}")
        for block in sorted(own):
            if block not in known:
                raise InputError(f"groups: '{name}' has block {block}; {there} that train")
            taken = next((other for other, blocks_of in blocks.items() if block in blocks_of), None)
            if taken is not None:
                raise InputError(
                    f"groups: block {block} is in '{taken}' and in '{name}'; give it to one"
                )
        blocks[str(name)] = own
    return blocks


def _numbers(name: str, given: object) -> frozenset[int]:
    """The blocks that `3`, `"0-3,7"` or `[0, 1]` stands for."""
    if isinstance(given, int) and not isinstance(given, bool):
        return frozenset([given])
    if isinstance(given, Sequence | set | frozenset | range) and not isinstance(given, str):
        return frozenset().union(*(_numbers(name, one) for one in given))
    numbers: set[int] = set()
    for piece in str(given).split(","):
        interval = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", piece)
        if isinstance(given, bool) or interval is None:
            if not piece.strip() and isinstance(given, str):
                continue
            raise InputError(
                f"groups: '{name}' has blocks {given!r}; write numbers and intervals such as "
                "'0-3,7', blocks counted from 0"
            )
        first, last = int(interval[1]), int(interval[2] or interval[1])
        if last < first:
            raise InputError(
                f"groups: '{name}' has blocks {given!r}, and {piece.strip()} ends before it "
                "begins; write the smaller number first"
            )
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def _written(blocks: set[int]) -> str:
    return f"{min(blocks)} to {max(blocks)}"


def _n_blocks(names: Sequence[str]) -> int:
    return max(map(block_of, names), default=OUTSIDE) + 1


def parameter_coordinates(names: Sequence[str], blocks: Blocks | None = None) -> dict[str, Any]:
    """Coordinates of the parameter axis: `block`, `kind` and `group` of every name.

    `block` is `OUTSIDE` for embeddings, the final norm and the output layer alike; `group` tells
    them apart.
    """
    groups, members = groups_of(names, blocks)
    return {
        "parameter": list(names),
        "block": ("parameter", np.array([block_of(name) for name in names])),
        "kind": ("parameter", [kind_of(name) for name in names]),
        "group": ("parameter", [groups[g] for g in members]),
    }

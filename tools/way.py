"""Show the way of a model through the package, from a public call to the first kernel.

    python tools/way.py                        the ways of `profile`, `check` and
                                               `per_sample_grad_norms`
    python tools/way.py --steps profile        and every step of one of these ways

Four figures of each call, on a tiny model, with nothing remembered of the model:

    stack     files of the package on the stack when the first op of `geffect_fast.ops` is called
    climbs    how often the stack goes on in a room above: a call-back
    entered   files with a function that was given the model by then, itself or in an object, in the
              order in which they were entered first
    climbs    how often this order goes on in a room above

Rooms are the parts of the package in the order in which they may import each other
(`tests/test_imports.py`): imported rooms lie below.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import geffect_fast as gf

ROOT = Path(gf.__file__).parent
ROOMS = (
    *("ops", "capture", "data", "objectives", "engines", "functional"),
    *("results", "settings", "arguments", "storage", "measure"),
)
"""Rooms, the lowest first. Modules beside them (`transfer`, `errors`) serve every room and are no
step."""
DEPTH = 3
"""Levels of nested objects that are searched for the model."""


@dataclass(frozen=True)
class Way:
    """The files seen until the first op was called.

    Attributes:
        stack: files on the stack, from the public call down, neighbours once.
        entered: files that were entered with the model in hand, each once.
    """

    stack: list[str]
    entered: list[str]


def climbs(files: list[str]) -> int:
    """The number of times that files go on in a room above."""
    return sum(_height(b) > _height(a) for a, b in pairwise(files))


def way_of(model: nn.Module, call: Callable[[], object]) -> Way:
    """Run `call`, which is given `model`, and record its way until the first op is called."""
    stack: list[str] = []
    entered: list[str] = []

    def see(frame: FrameType, event: str, _: Any) -> None:
        file = _file(frame) if event == "call" and not stack else None
        if file is None:
            return
        if file == "ops/backend.py" and frame.f_code.co_name == "call":
            at: FrameType | None = frame
            while at is not None:
                known = _file(at)
                stack.extend([] if known is None else [known])
                at = at.f_back
            stack[:] = _neighbours_once(stack[::-1])
            sys.setprofile(None)
        elif any(_holds(value, model, DEPTH) for value in frame.f_locals.values()):
            entered.append(file)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Way(stack, list(dict.fromkeys(entered)))


def _file(frame: FrameType) -> str | None:
    """The file of a frame, relative to the package's folder; None for a file from elsewhere."""
    path = frame.f_code.co_filename
    if not path.startswith(f"{ROOT}/") or frame.f_code.co_name == "<module>":
        return None
    file = path.removeprefix(f"{ROOT}/")
    return file if _room(file) in ROOMS else None


def _room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def _height(file: str) -> int:
    return ROOMS.index(_room(file))


def _holds(value: Any, model: nn.Module, depth: int) -> bool:
    if value is model:
        return True
    own = depth > 0 and type(value).__module__.startswith("geffect_fast")
    return own and any(
        _holds(inside, model, depth - 1) for inside in getattr(value, "__dict__", {}).values()
    )


def _neighbours_once(files: list[str]) -> list[str]:
    return [b for a, b in pairwise(["", *files]) if a != b]


def tiny_model() -> nn.Module:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()


def tokenised(n: int) -> list[dict[str, list[int]]]:
    """Rows of tokens, half of each a prompt."""
    rows = torch.randint(0, 64, (n, 8), generator=torch.Generator().manual_seed(n)).tolist()
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in rows]


def losses_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One loss for each sample."""
    logits = model(**batch).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].mT, batch["input_ids"][:, 1:], reduction="none"
    )
    return loss.mean(1)


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "profile": lambda model: gf.profile(
        model, None, forget=tokenised(3), retain=tokenised(4), objectives=["ga", "npo(beta=0.1)"]
    ),
    "check": lambda model: gf.check(model, None, data=tokenised(2)),
    "per_sample_grad_norms": lambda model: gf.functional.per_sample_grad_norms(
        model, losses_of, {"input_ids": torch.tensor([r["input_ids"] for r in tokenised(3)])}
    ),
}


def main() -> None:
    """Print the figures, and the steps of one way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", choices=CALLS, help="show every step of this call's way")
    steps = parser.parse_args().steps
    for name, call in CALLS.items():
        model = tiny_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(model)  # modules that are imported late are imported now
        model = tiny_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way = way_of(model, lambda: call(model))  # noqa: B023
        print(
            f"{name}: stack {len(set(way.stack))} files, {climbs(way.stack)} climbs; "
            f"entered {len(way.entered)} files, {climbs(way.entered)} climbs"
        )
        if name == steps:
            print("  stack:", *way.stack, sep="\n    ")
            print("  entered:", *way.entered, sep="\n    ")


if __name__ == "__main__":
    main()

"""The time that each fast rule of the forward engine saves: the whole pass without the rule.

    python benchmarks/bench_rules.py            # writes benchmarks/results/rules_cpu.csv
    python benchmarks/bench_rules.py --quick    # a tiny model, one shape, prints only

The passes are those of bench_forward.py, with two risks and five objectives. A function or module
without its rule is differentiated by the framework's own rules. Attention without its rule is
written as products and a softmax, since fused attention has none. Contestants take turns; the least
of `--rounds` rounds counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from bench_forward import SHAPES, contestants
from machine import interleaved_minima, run_shapes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from geffect_fast.engines.dual import model as dual_model
from geffect_fast.engines.dual.layers import Gated, RMSNorm
from geffect_fast.engines.dual.modules import fast_forwards
from geffect_fast.engines.dual.tensor import RULES

ALL = "all rules"


def without_function(function: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Serve a function by the framework's own rule."""
    others = {key: rule for key, rule in RULES.items() if key is not function}
    return patch.dict(RULES, others, clear=True)


def without_modules(kind: type) -> AbstractContextManager[Any]:
    """Run modules of one kind as they are written out."""

    def others(model: nn.Module) -> dict[nn.Module, Any]:
        found: dict[nn.Module, Any] = fast_forwards(model)
        return {module: f for module, f in found.items() if not isinstance(f.args[0], kind)}

    return patch.object(dual_model, "fast_forwards", others)


@contextmanager
def without_attention() -> Iterator[None]:
    """Serve attention by the framework's own rule, for which it must not be fused."""
    with without_function(F.scaled_dot_product_attention), sdpa_kernel(SDPBackend.MATH):
        yield


LEFT_OUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    ALL: nullcontext,
    "linear layers": lambda: without_function(F.linear),
    "label's log-probability": lambda: without_function(F.cross_entropy),
    "attention": without_attention,
    "RMS norms": lambda: without_modules(RMSNorm),
    "gated MLPs": lambda: without_modules(Gated),
}


def measure(model: nn.Module, n: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one shape."""
    run = contestants(model, n, length)["forward engine", 5]

    def left_out(name: str) -> None:
        with LEFT_OUT[name]():
            run()

    seconds = interleaved_minima({name: partial(left_out, name) for name in LEFT_OUT}, rounds)
    return [
        {
            "samples": n,
            "length": length,
            "left_out": "" if name == ALL else name,
            "rounds": rounds,
            "min_s": float(f"{seconds[name]:.4g}"),
            "of_all": float(f"{seconds[name] / seconds[ALL]:.4g}"),
        }
        for name in LEFT_OUT
    ]


if __name__ == "__main__":
    run_shapes(
        __doc__,
        "rules_cpu.csv",
        SHAPES,
        measure,
        lambda row: (
            f"without {row['left_out'] or 'nothing':23} {row['min_s']:8.3f} s "
            f"{row['of_all']:7.3f} of all rules"
        ),
    )

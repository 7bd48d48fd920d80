"""Choice of the engine for a profile, by the axes that each engine resolves and by its cost.

Costs are in forward passes over the forget data (M risks, K elementary objectives), beside the
risks' gradients, which both engines start from:

    reverse  1 + M + K      one forward, the projections on M directions, K backwards without weight
                            gradients; another K where norms are asked for
             1 + 2 K        K whole gradients, where samples are not told apart
    forward  1 + 2 M        a value, and M tangents of it, each two products a layer
             sum_g 1 + M (w_g + W_g)
                            with groups, one pass each: `w_g` is the group's share of the products,
                            `W_g` that of the group and all after it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from geffect_fast.errors import InputError

Engine = Literal["reverse", "forward"]


@dataclass(frozen=True)
class Choice:
    """An engine, and why it was chosen, in words."""

    engine: Engine
    reason: str


def reverse_units(n_risks: int, n_parts: int, per_sample: bool, norms: bool) -> float:
    """Forward passes that the reverse engine costs."""
    if not per_sample:
        return 1 + 2 * n_parts
    return 1 + n_risks + n_parts * (1 + norms)


def forward_units(n_risks: int, shares: Sequence[float]) -> float:
    """Forward passes that the forward engine costs.

    Args:
        n_risks: M.
        shares: each group's share of the model's products, front to back; `[1]` for the whole.
    """
    return sum(1 + n_risks * (share + sum(shares[g:])) for g, share in enumerate(shares))


def choose_engine(
    asked: str,
    axes: Sequence[str],
    norms: bool | None,
    *,
    n_risks: int,
    n_parts: int,
    shares: Sequence[float],
) -> Choice:
    """The engine for a profile, as far as it can be known without the model.

    Args:
        asked: `auto`, or the engine that is wanted.
        axes: the result's axes.
        norms: whether norms of the objectives' gradients are wanted; None: if the reverse engine
            is chosen, which alone forms these gradients.
        n_risks, n_parts, shares: as `reverse_units` and `forward_units` take them.

    Raises:
        InputError: the request needs an engine other than `asked`, or needs both engines.
    """
    needs: dict[Engine, str] = {}
    for axis in ("parameter", "position"):
        if axis in axes:
            needs["reverse"] = f"resolve by '{axis}'"
    if norms:
        needs["reverse"] = needs.get("reverse", "norms=True (--norms)")
    if "token" in axes:
        needs["forward"] = "resolve by 'token'"
    if asked in ("reverse", "forward"):
        for engine, what in needs.items():
            if engine != asked:
                raise InputError(
                    f"engine: {what} needs the {engine} engine; use engine='{engine}' or 'auto'"
                )
        return Choice("forward" if asked == "forward" else "reverse", "asked for")
    if len(needs) > 1:
        raise InputError(
            f"resolve: {needs['reverse']} needs the reverse engine, {needs['forward']} the forward "
            "one; make two profiles"
        )
    for engine, what in needs.items():
        return Choice(engine, f"{what} needs it")
    backward = reverse_units(n_risks, n_parts, "sample" in axes, norms is None)
    forward = forward_units(n_risks, shares)
    chosen: Engine = "forward" if forward < backward else "reverse"
    costs = {"forward": forward, "reverse": backward}
    other = "reverse" if chosen == "forward" else "forward"
    return Choice(
        chosen, f"{costs[chosen]:.3g} forward passes, against {costs[other]:.3g} of {other}"
    )

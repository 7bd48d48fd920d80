"""Names of risks and of the effects on them, the same in every output."""

from __future__ import annotations

UNLEARN = "unlearn"
"""The forget risk, as results call it."""


def symbol(risk: str) -> str:
    """The index that stands for a risk: u, r, or a probe's own name."""
    return {UNLEARN: "u", "retain": "r"}.get(risk, risk)


def effect_name(risk: str) -> str:
    """The name of the effect on a risk: `e_u`, `e_r`, or `e_` and a probe's name."""
    return f"e_{symbol(risk)}"

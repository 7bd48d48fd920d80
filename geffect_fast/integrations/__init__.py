"""Probes and update rules for other packages' training loops, imported on first access."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geffect_fast.integrations.update_rules import use_update_rule
    from geffect_fast.steps.callback import GEffectCallback

__all__ = ["GEffectCallback", "use_update_rule"]

_PLACES = {
    "GEffectCallback": "geffect_fast.steps.callback",
    "use_update_rule": "geffect_fast.integrations.update_rules",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'geffect_fast.integrations' has no attribute '{name}'")
    if name == "GEffectCallback":  # gives results, which have `.gf` then
        import geffect_fast.report.notebook.accessor  # noqa: F401
    return getattr(importlib.import_module(_PLACES[name]), name)

"""Probes for other packages' training loops; each is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geffect_fast.steps.callback import GEffectCallback

__all__ = ["GEffectCallback"]


def __getattr__(name: str) -> Any:
    if name != "GEffectCallback":
        raise AttributeError(f"module 'geffect_fast.integrations' has no attribute '{name}'")
    from geffect_fast.steps.callback import GEffectCallback

    return GEffectCallback

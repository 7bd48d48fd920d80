"""Exact gradient effects of language-model unlearning, per layer, sample and objective."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geffect_fast import threads

threads.prepare()  # must run before torch is loaded, which the next lines do

if TYPE_CHECKING or not threads.is_command():  # a command loads what it needs: --help no torch
    from geffect_fast import data, objectives, ops
    from geffect_fast.capture import capture

if TYPE_CHECKING:
    import geffect_fast.functional as functional
    import geffect_fast.integrations as integrations
    import geffect_fast.ranks as ranks
    import geffect_fast.updates as updates
    from geffect_fast.measure.against_effects import against_effects
    from geffect_fast.measure.check import check
    from geffect_fast.measure.control import control
    from geffect_fast.measure.evaluate import evaluate
    from geffect_fast.measure.profile import profile
    from geffect_fast.measure.sweep import pareto_front, sweep
    from geffect_fast.metrics.optimal_weights import optimal_weights, write_weighted
    from geffect_fast.report.html.page import write_page
    from geffect_fast.steps.compare import compare
    from geffect_fast.steps.profile_checkpoints import profile_checkpoints
    from geffect_fast.storage.evaluation import open_evaluation
    from geffect_fast.storage.run_folder import open_run
    from geffect_fast.training.relearn import relearn
    from geffect_fast.training.unlearn import unlearn

__version__ = "0.1.0"

__all__ = [
    "against_effects",
    "capture",
    "check",
    "compare",
    "control",
    "data",
    "evaluate",
    "functional",
    "integrations",
    "objectives",
    "open_evaluation",
    "open_run",
    "ops",
    "optimal_weights",
    "pareto_front",
    "profile",
    "profile_checkpoints",
    "ranks",
    "relearn",
    "sweep",
    "unlearn",
    "updates",
    "write_page",
    "write_weighted",
]

# Names whose modules need more than torch and numpy are imported at their first use.
_LAZY = {
    "against_effects": ("geffect_fast.measure.against_effects", "against_effects"),
    "capture": ("geffect_fast.capture", "capture"),
    "check": ("geffect_fast.report.notebook.check", "check"),
    "compare": ("geffect_fast.steps.compare", "compare"),
    "control": ("geffect_fast.measure.control", "control"),
    "data": ("geffect_fast.data", None),
    "evaluate": ("geffect_fast.measure.evaluate", "evaluate"),
    "functional": ("geffect_fast.functional", None),
    "integrations": ("geffect_fast.integrations", None),
    "objectives": ("geffect_fast.objectives", None),
    "open_evaluation": ("geffect_fast.storage.evaluation", "open_evaluation"),
    "open_run": ("geffect_fast.storage.run_folder", "open_run"),
    "ops": ("geffect_fast.ops", None),
    "optimal_weights": ("geffect_fast.metrics.optimal_weights", "optimal_weights"),
    "pareto_front": ("geffect_fast.measure.sweep", "pareto_front"),
    "profile": ("geffect_fast.measure.profile", "profile"),
    "profile_checkpoints": ("geffect_fast.steps.profile_checkpoints", "profile_checkpoints"),
    "ranks": ("geffect_fast.ranks", None),
    "relearn": ("geffect_fast.training.relearn", "relearn"),
    "sweep": ("geffect_fast.measure.sweep", "sweep"),
    "unlearn": ("geffect_fast.training.unlearn", "unlearn"),
    "updates": ("geffect_fast.updates", None),
    "write_page": ("geffect_fast.report.html.page", "write_page"),
    "write_weighted": ("geffect_fast.metrics.optimal_weights", "write_weighted"),
}
_RESULTS = {
    *("against_effects", "compare", "control", "evaluate", "open_evaluation", "open_run"),
    *("profile", "profile_checkpoints", "relearn", "sweep", "unlearn"),
}
"""Functions that return results, whose accessor `.gf` has to be loaded."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'geffect_fast' has no attribute '{name}'")
    if name in _RESULTS:
        importlib.import_module("geffect_fast.report.notebook.accessor")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Metrics of unlearned models as the literature defines them, by name."""

from geffect_fast.metrics import likelihood, membership, memorisation, overlap, tofu
from geffect_fast.metrics.base import Measure, Metric, Seen
from geffect_fast.metrics.observed import Observed, Scored
from geffect_fast.metrics.registry import SUITES, available, register, resolved_metrics

__all__ = [
    "SUITES",
    "Measure",
    "Metric",
    "Observed",
    "Scored",
    "Seen",
    "available",
    "likelihood",
    "membership",
    "memorisation",
    "overlap",
    "register",
    "resolved_metrics",
    "tofu",
]

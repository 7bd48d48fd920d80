"""Unlearning objectives: classes, names, strings."""

from geffect_fast.objectives.base import Composite, Objective, Outputs, Sum
from geffect_fast.objectives.divergence import KL
from geffect_fast.objectives.likelihood import GA, GD, NLL, PO, WGA
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.parse import parse, parse_list, resolve
from geffect_fast.objectives.preference import DPO, NPO, TNPO, WTNPO, SimNPO
from geffect_fast.objectives.registry import available, register
from geffect_fast.objectives.representation import RMU

__all__ = [
    "DPO",
    "GA",
    "GD",
    "KL",
    "NLL",
    "NPO",
    "PO",
    "RMU",
    "TNPO",
    "WGA",
    "WTNPO",
    "Composite",
    "Objective",
    "Outputs",
    "SimNPO",
    "Sum",
    "available",
    "parameter",
    "parse",
    "parse_list",
    "register",
    "resolve",
]

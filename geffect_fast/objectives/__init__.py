"""Unlearning objectives: classes, names, strings."""

from geffect_fast.objectives.base import Composite, Objective, Outputs, Sum
from geffect_fast.objectives.divergence import CEU, KL, UNDIAL
from geffect_fast.objectives.likelihood import GA, GD, NLL, PO, WGA, SatImp, TokenWeights
from geffect_fast.objectives.parameters import parameter
from geffect_fast.objectives.parse import parse, parse_list, resolve
from geffect_fast.objectives.preference import DPO, NPO, TNPO, WTNPO, AltPO, SimNPO
from geffect_fast.objectives.primal_dual import PDU
from geffect_fast.objectives.ranges import Sweep, expand
from geffect_fast.objectives.registry import available, register
from geffect_fast.objectives.representation import RMU, RR, RMUMask

__all__ = [
    "CEU",
    "DPO",
    "GA",
    "GD",
    "KL",
    "NLL",
    "NPO",
    "PDU",
    "PO",
    "RMU",
    "RR",
    "TNPO",
    "UNDIAL",
    "WGA",
    "WTNPO",
    "AltPO",
    "Composite",
    "Objective",
    "Outputs",
    "RMUMask",
    "SatImp",
    "SimNPO",
    "Sum",
    "Sweep",
    "TokenWeights",
    "available",
    "expand",
    "parameter",
    "parse",
    "parse_list",
    "register",
    "resolve",
]

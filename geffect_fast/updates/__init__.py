"""Update rules: what is done with gradients before an optimizer steps."""

from geffect_fast.updates.base import UpdateRule
from geffect_fast.updates.conflict import BLUR, GRU, GU, SAGO, SGD, OrthoGrad, PCGrad
from geffect_fast.updates.registry import available, parse, register
from geffect_fast.updates.sharpness import SAM
from geffect_fast.updates.step import Losses, RetainBatch, Step
from geffect_fast.updates.updater import Updater

__all__ = [
    "BLUR",
    "GRU",
    "GU",
    "SAGO",
    "SAM",
    "SGD",
    "Losses",
    "OrthoGrad",
    "PCGrad",
    "RetainBatch",
    "Step",
    "UpdateRule",
    "Updater",
    "available",
    "parse",
    "register",
]

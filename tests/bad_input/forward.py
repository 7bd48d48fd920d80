"""The forward engine: unusable groups of blocks, unusable combinations of axes and settings.

Further models that it cannot pass, and objectives whose terms belong to no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from bad_input.case import Case, patched, profile
from bad_input.data import call
from bad_input.models import MLP
from engines.small_models import Halve

from geffect_fast.objectives import Objective


def grouped(*groups: str, resolve: str = "group,sample", **changes: str) -> list[str]:
    """A profile by these groups of the three blocks."""
    return [
        *profile(resolve=resolve, **changes),
        *(word for group in groups for word in ("--group", group)),
    ]


def in_python(groups, resolve=("group", "sample")):
    return call(groups=groups, resolve=resolve)


def without_jvp(self, x):
    return self.down_proj(Halve.apply(self.gate_proj(x)) * self.up_proj(x))


@torch.library.custom_op("geffect_fast_bad_input::halve", mutates_args=())
def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


halve.register_autograd(lambda ctx, grad: grad / 2)
halve.register_fake(torch.empty_like)


def silent(self, x):
    return self.down_proj(halve(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class OfEveryToken(Objective):
    """An objective with a term at every position, also at tokens that no objective is about."""

    needs: ClassVar = frozenset({"hidden_states"})

    def loss(self, outputs, batch, reference):
        return self.token_terms(outputs, batch, reference).sum()

    def token_terms(self, outputs, batch, reference):
        return outputs.hidden_states[0].sum(-1)


class Once(Halve):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad / 2


@dataclass(frozen=True)
class OnceDifferentiable(Objective):
    """An operation whose gradient has no derivative."""

    def loss(self, outputs, batch, reference):
        return self.token_terms(outputs, batch, reference).sum()

    def token_terms(self, outputs, batch, reference):
        return Once.apply(outputs.token_logprob)


FORWARD = {"engine": "forward", "norms": False}

CASES = [
    # ---- groups of blocks ----
    Case(
        "groups upside down",
        grouped("first=0", "last=2-1"),
        "'last' has blocks '2-1', and 2-1 ends before it begins",
        "write the smaller number first",
    ),
    Case("an empty group", grouped("first=,"), "'first' is empty", "the model has blocks 0 to 2"),
    Case("a group of no blocks", grouped("first="), "--group 'first='", "must be NAME=BLOCKS"),
    Case("a group without a name", grouped("=0-1"), "--group '=0-1'", "must be NAME=BLOCKS"),
    Case("blocks alone", grouped("0-1"), "--group '0-1'", "must be NAME=BLOCKS"),
    Case(
        "an unknown block",
        grouped("first=0-3"),
        "'first' has block 3",
        "the model has blocks 0 to 2",
    ),
    Case(
        "a block in two groups",
        grouped("first=0-1", "last=1,2"),
        "block 1 is in 'first' and in 'last'",
        "give it to one",
    ),
    Case("a group twice", grouped("first=0", "first=1"), "--group 'first=1'", "choose another"),
    Case(
        "a group by a name that is taken",
        grouped("lm_head=0"),
        "the name 'lm_head' is taken",
        "choose another",
    ),
    Case(
        "a group by the name of the rest",
        grouped("other_blocks=0"),
        "the name 'other_blocks' is taken",
        "choose another",
    ),
    Case(
        "blocks by words",
        grouped("first=zero"),
        "'first' has blocks 'zero'",
        "write numbers and intervals such as '0-3,7'",
    ),
    Case("a negative block", grouped("first=-1"), "'first' has blocks '-1'", "counted from 0"),
    Case(
        "groups without the axis",
        grouped("first=0", resolve="sample"),
        "groups: goes with resolve by 'group' or 'parameter'",
        "leave it out",
    ),
    Case(
        "groups that are a list", in_python(["0-1"]), "groups: got ['0-1']", "give blocks by name"
    ),
    Case(
        "a group of half a block",
        in_python({"first": 0.5}),
        "'first' has blocks 0.5",
        "write numbers and intervals",
    ),
    Case(
        "a group of truth", in_python({"first": True}), "'first' has blocks True", "write numbers"
    ),
    Case(
        "a group of an unknown block among numbers",
        in_python({"first": [0, 5]}),
        "'first' has block 5",
        "the model has blocks 0 to 2",
    ),
    # ---- requests that only one engine serves ----
    Case(
        "parameters by the forward engine",
        profile(resolve="parameter,sample", engine="forward"),
        "resolve by 'parameter' needs the reverse engine",
        "use engine='reverse' or 'auto'",
    ),
    Case(
        "parameters by the forward engine, as resolve is by default",
        profile(engine="forward"),
        "resolve by 'parameter' needs the reverse engine",
        "use engine='reverse' or 'auto'",
    ),
    Case(
        "positions by the forward engine",
        profile(resolve="sample,position", engine="forward"),
        "resolve by 'position' needs the reverse engine",
        "use engine='reverse' or 'auto'",
    ),
    Case(
        "norms by the forward engine",
        [*profile(resolve="sample", engine="forward"), "--norms"],
        "norms=True (--norms) needs the reverse engine",
        "use engine='reverse' or 'auto'",
    ),
    Case(
        "tokens by the reverse engine",
        profile(resolve="sample,token", engine="reverse"),
        "resolve by 'token' needs the forward engine",
        "use engine='forward' or 'auto'",
    ),
    Case(
        "tokens and parameters",
        profile(resolve="parameter,sample,token"),
        "resolve by 'parameter' needs the reverse engine, resolve by 'token' the forward one",
        "make two profiles",
    ),
    Case(
        "tokens and norms",
        [*profile(resolve="sample,token"), "--norms"],
        "norms=True (--norms) needs the reverse engine, resolve by 'token' the forward one",
        "make two profiles",
    ),
    Case(
        "a file for tokens without samples",
        call(resolve=["token"], out="effects.nc"),
        "out: goes with resolve by 'sample' and 'position' or 'token'",
        "leave it out",
    ),
    # ---- models that forward mode does not pass ----
    Case(
        "code without a forward-mode derivative",
        profile(resolve="sample", engine="forward"),
        "module 'model.layers.0.mlp' (LlamaMLP) has no forward-mode derivative",
        "use engine='reverse'",
        patched(MLP, without_jvp),
    ),
    Case(
        "tokens of code without a forward-mode derivative",
        profile(resolve="sample,token"),
        "module 'model.layers.0.mlp' (LlamaMLP) has no forward-mode derivative",
        "use engine='reverse', without 'token'",
        patched(MLP, without_jvp),
    ),
    Case(
        "code that drops tangents",
        profile(resolve="sample", engine="forward"),
        "gate_proj.weight': forward mode gives 0 times the derivative",
        "use engine='reverse'",
        patched(MLP, silent),
    ),
    Case(
        "terms of tokens that have no label",
        call(objectives=[OfEveryToken()], resolve=["sample", "token"]),
        "objective OfEveryToken: token_terms has a term at a position that predicts no label",
        "resolve without 'token', or set its `term_at`",
    ),
    Case(
        "terms that can be differentiated once",
        call(objectives=[OnceDifferentiable()], resolve=["sample"], **FORWARD),
        "objective OnceDifferentiable: the gradient of its token_terms has no derivative",
        "use engine='reverse'",
    ),
]

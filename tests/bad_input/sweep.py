"""Bad ranges, sweeps that are too large, and options that do not go together."""

from __future__ import annotations

import json

from bad_input.case import Case, holds, profile
from models import build, samples

import geffect_fast as gf
from geffect_fast.objectives.ranges import expand

CODE = "__import__('os').system('touch X')"


def sweep(**changes: str | None) -> list[str]:
    """A `sweep` command line that works, with some options changed."""
    return ["sweep", *profile(**{"objectives": "wga(alpha=1:2:2)"} | changes)[1:]]


def of(objectives: str) -> list[str]:
    return sweep(objectives=objectives)


def call(**changes: object):
    """A sweep from Python, with some arguments changed."""
    data = {"forget": samples([4]), "retain": samples([4]), "objectives": "wga(1:2:2)"} | changes
    return lambda _: gf.sweep(build("llama"), None, **data)


CASES = [
    # ---- ranges ----
    Case(
        "a range upside down", of("wga(alpha=7:0.1:3)"), "range 7:0.1 ends before", "character 11"
    ),
    Case("no value in a range", of("wga(1:2:0)"), "got 0 (character 9", "at least 2"),
    Case("one value between two", of("wga(1:2:1)"), "got 1 (character 9", "at least 2"),
    Case("half a value", of("wga(1:2:2.5)"), "got 2.5", "a whole number of values"),
    Case("fewer than no values", of("wga(1:1:-3)"), "got -3", "a whole number of values"),
    Case("a range without a count", of("wga(1:2)"), "unexpected ')'", "expected ':' (character 8"),
    Case("a range of four", of("wga(1:2:3:4)"), "unexpected ':'", "expected ')' or ','"),
    Case("a range without a stop", of("wga(1::3)"), "unexpected ':'", "a number (character 7"),
    Case("a logarithm of zero", of("npo(beta=0:4:3,log)"), "range 0:4:3", "must be above 0"),
    Case("a logarithm of less", of("simnpo(delta=-1:4:3,log)"), "range -1:4:3", "must be above 0"),
    Case("a spacing that is none", of("npo(0.1:4:3,lin)"), "not 'lin'", "character 13"),
    Case("a logarithm twice", of("npo(0.1:4:3,log,log)"), "not 'log'", "only 'log' behind a range"),
    Case("a logarithm of no range", of("npo(0.1,log)"), "not 'log'", "goes behind a range"),
    Case("an infinite range", of("wga(1:inf:3)"), "unexpected 'inf'", "a number (character 7"),
    Case("a range beyond numbers", of("wga(1:1e999:3)"), "'1e999'", "out of range (character 7"),
    Case("a range below the parameter's", of("npo(0:1:3)"), "npo: beta", "above 0, got 0.0"),
    Case("a range of half layers", of("rmu(layer=1:2:3)"), "1:2:3 holds 1.5", "rmu: layer must be"),
    Case("a range of bools", of("rmu(1, normalize=0:1:2)"), "normalize", "must be true or false"),
    Case(
        "a swept layer that is not there",
        of("rmu(layer=1:9:9)"),
        "rmu: layer",
        "at most 3, the model",
    ),
    Case("an unknown parameter", of("wga(alfa=1:2:3)"), "'alfa'", "did you mean 'alpha'"),
    Case("too many ranges", of("npo(1:2:3, 1:2:3)"), "too many arguments", "npo takes (beta)"),
    Case("a range twice", of("npo(beta=1:2:3,beta=1)"), "npo: beta", "is given twice"),
    Case("a coefficient out of range", of("1e308:1.5e308:2*(9*ga)"), "coefficient", "character 1 "),
    Case("a negative coefficient", of("-1:2:3*ga"), "unexpected ':'", "expected '*' (character 3"),
    Case("a range alone", of("1:2:3"), "end of the string", "expected '*'"),
    Case("a range of objectives", of("ga:npo:3"), "unexpected ':'", "character 3"),
    Case("code in a range", of(f"npo(beta=0.1:{CODE}:3)"), "unexpected '__import__'", "a number"),
    Case("ranges in a risk", sweep(risk="wga(1:2:2)"), "--risk: range 1:2:2", "give one value"),
    # ---- the number of objectives ----
    Case(
        "too many values", of("wga(1:2:10001)"), "'wga(1:2:10001)' brings", "above 10000; use fewer"
    ),
    Case(
        "too large a grid",
        of("wtnpo(1:2:101,1:2:100)"),
        "above 10000",
        "fewer values in each range",
    ),
    Case("too many in all", of("wga(0:1:9999),ga,npo"), "'npo' brings", "above 10000; use fewer"),
    Case(
        "a count beyond numbers", of("wga(1:2:9e99)"), "'wga(1:2:9e99)'", "above 10000; use fewer"
    ),
    Case("a sweep of nothing", of(""), "objective string '' is empty", "write a name"),
    Case("no sweep at all", sweep(objectives=None), "--objectives is missing", "give it"),
    Case(
        "a range listed twice", [*sweep(), "wga(alpha=1:2:2)"], "is listed twice", "leave one out"
    ),
    Case(
        "no refusals", sweep(objectives="dpo(beta=1:2:2)", refusals=None), "dpo", "--refusals FILE"
    ),
    # ---- commands ----
    Case(
        "a range to profile", profile(objectives="wga(1:2:3)"), "range 1:2:3", "geffect-fast sweep"
    ),
    Case("an unknown option of a sweep", sweep(objektive="ga"), "--objektive", "sweep --help"),
    Case("a file for an objective", [*sweep(), "forget.jsonl"], "unexpected '.'", "character 7"),
    Case(
        "a sweep's config to profile",
        profile(objectives=None, config="my.yaml"),
        "config my.yaml is of a run of sweep",
        "use geffect-fast sweep --config my.yaml",
        holds("my.yaml", json.dumps({"command": "sweep", "objectives": ["wga(1:2:2)"]})),
    ),
    Case(
        "a training's config to sweep",
        [*sweep(), "--config", "my.yaml"],
        "config my.yaml is of a run of unlearn",
        "use geffect-fast unlearn --config my.yaml",
        holds("my.yaml", json.dumps({"command": "unlearn", "steps": 2})),
    ),
    Case(
        "a config of a list of commands",
        profile(config="my.yaml"),
        "my.yaml: command",
        "should be",
        holds("my.yaml", json.dumps({"command": ["sweep"]})),
    ),
    Case(
        "a config of no command",
        profile(config="my.yaml"),
        "my.yaml: command",
        "choose from profile, sweep",
        holds("my.yaml", json.dumps({"command": "train"})),
    ),
    # ---- from Python ----
    Case("a sweep without an end", call(objectives=["wga(1:2:3"]), "end of the string", "expected"),
    Case("a sweep of a number", call(objectives=[3]), "objective 3", "must be a string or"),
    Case("an empty sweep", call(objectives=[]), "objectives: the list is empty", "such as 'ga'"),
    Case("a number for a sweep", call(objectives=7), "objectives: got 7", "give a list, such as"),
    Case(
        "a range twice from Python", call(objectives="ga,ga"), "'ga' is listed twice", "leave one"
    ),
    Case("a file for a sweep", call(out="x.nc"), "out: the result of a sweep", "leave it out"),
    Case("a list for one sweep", lambda _: expand("ga,npo"), "'ga,npo' is a list", "give one"),
    Case("a sweep of a class", lambda _: expand(gf.objectives.NPO), "NPO", "write NPO()"),
]

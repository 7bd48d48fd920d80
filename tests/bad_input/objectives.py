"""Objectives that do not exist, make no sense, or try to be more than objectives."""

from __future__ import annotations

from bad_input.case import Case, check, holds, profile
from bad_input.data import call

import geffect_fast as gf

CODE = "__import__('os').system('touch X')"


def of(objectives: str) -> list[str]:
    return profile(objectives=objectives)


CASES = [
    Case(
        "a trainer of open-unlearning that is none",
        of("open_unlearning.NPOO"),
        "there is no objective for a trainer 'NPOO' of open-unlearning",
        "did you mean 'NPO'?",
    ),
    Case(
        "a parameter that its trainer has not",
        of("open_unlearning.SimNPO(betta=1)"),
        "objective open_unlearning.SimNPO has no parameter 'betta'",
        "did you mean 'beta'?",
    ),
    Case("unknown objective", of("ga,nppo"), "unknown objective 'nppo'", "did you mean 'npo'?"),
    Case(
        "unlike any objective", of("zzz"), "unknown objective 'zzz'", "known: altpo, ceu, dpo, ga"
    ),
    Case(
        "unknown objective in a check", check("--objectives", "gaa"), "'gaa'", "did you mean 'ga'?"
    ),
    Case(
        "unknown parameter",
        of("wga(alfa=1)"),
        "wga has no parameter 'alfa'",
        "did you mean 'alpha'",
    ),
    Case("too many parameters", of("npo(1, 2)"), "too many arguments", "npo takes (beta)"),
    Case("parameter twice", of("npo(beta=1, beta=1)"), "npo: beta", "is given twice"),
    Case("parameter missing", of("pdu"), "objective pdu", "needs a value for eps"),
    Case(
        "bracket missing",
        of("npo(beta=1"),
        "'npo(beta=1'",
        "unexpected end of the string, expected",
    ),
    Case("bracket too many", of("npo)"), "unexpected ')'", "expected '+' or ','"),
    Case("a term missing", of("ga +"), "'ga +'", "expected"),
    Case("not a number", of("npo(nan)"), "not 'nan'", "expected a number, true or false"),
    Case("infinite", of("wga(alpha=inf)"), "not 'inf'", "expected a number, true or false"),
    Case("larger than numbers", of("npo(1e999)"), "number '1e999'", "too long or out of range"),
    Case(
        "negative beta", of("npo(beta=-2)"), "npo: beta", "must be a finite number above 0, got -2"
    ),
    Case("negative alpha", of("wga(alpha=-1)"), "wga: alpha", "must be a finite number at least 0"),
    Case("half a layer", of("rmu(layer=1.5)"), "rmu: layer", "must be a 64-bit integer at least 0"),
    Case("coefficient out of range", of("1e308*10*ga"), "coefficient", "out of range (character 1"),
    Case("a product of objectives", of("ga*nll"), "unexpected 'nll'", "expected"),
    Case("a number alone", of("2"), "end of the string", "expected '*'"),
    Case("objective twice", of("ga,ga"), "'ga' is listed twice", "leave one out"),
    Case(
        "twice in other words",
        of("npo,npo(beta=0.1)"),
        "'npo(beta=0.1)' is listed twice",
        "leave one",
    ),
    Case("no objective", of(""), "objective string '' is empty", "write a name such as 'ga'"),
    Case("commas alone", of(",,"), "unexpected ','", "expected"),
    Case("objectives left out", profile(objectives=None), "--objectives is missing", "give it"),
    Case(
        "retain data left out",
        profile(objectives="gd", retain=None),
        "--retain is missing",
        "give it",
    ),
    Case("no row to retain", call(objectives=["gd"], retain=[]), "retain", "give at least one"),
    Case("no gradient to check", check("--objectives", "kl"), "objective 'kl'", "give another"),
    Case(
        "a layer that is not there",
        of("rmu(layer=40)"),
        "rmu: layer",
        "at most 3, the model's last, got 40",
    ),
    Case(
        "a layer to retain", of("ga+rr(layer=4)"), "rr: layer", "at most 3, the model's last, got 4"
    ),
    Case("every token skipped", of("ceu(skip=500)"), "no answer has more than 500 tokens", "ceu"),
    Case(
        "a risk that is none",
        profile(risk="nlll"),
        "unknown objective 'nlll'",
        "did you mean 'nll'",
    ),
    Case("a risk with a reference", profile(risk="npo"), "risk: 'npo'", "such as nll"),
    Case(
        "a risk of two parts", profile(risk="ga+nll"), "risk: 'ga + nll'", "must be one objective"
    ),
    # ---- strings that must never run: the folder stays without a file X ----
    Case("an import", of(CODE), 'unexpected "\'"', "character 12 of"),
    Case(
        "an import as a parameter",
        of(f"npo(beta={CODE})"),
        "unexpected '('",
        "expected ')' or ',' (character 20",
    ),
    Case("an import as a coefficient", of(f"{CODE}*ga"), 'unexpected "\'"', "character 12 of"),
    Case("an import as a risk", profile(risk=CODE), "--risk: unexpected", "character 12 of"),
    Case("an attribute", of("ga.__class__.__mro__"), "unexpected '.'", "character 3"),
    Case("a lambda", of("lambda: ga"), "unexpected ':'", "character 7"),
    Case("a shell command", of("$(touch X)"), "unexpected '$'", "character 1"),
    Case("a shell command in backticks", of("`touch X`"), "unexpected '`'", "character 1"),
    Case("a template", of("{{ cycler.__init__ }}"), "unexpected '{'", "character 1"),
    Case("a statement", of("ga; import os"), "unexpected ';'", "character 3"),
    Case(
        "an object in YAML",
        ["profile", "--config", "my.yaml", "--out", "run"],
        "config my.yaml",
        "not valid YAML at line 1",
        holds("my.yaml", "objectives: !!python/object/apply:os.system ['touch X']\n"),
    ),
    # ---- strings that must not take long ----
    Case(
        "a million characters",
        call(objectives="ga+" * 333_333 + "ga"),
        "1000001 char",
        "at most 10000",
    ),
    Case("deep nesting", of("(" * 9_000 + "ga"), "unexpected end of the string", "expected"),
    Case("a long name", of("x" * 9_000), "unknown objective 'xxxxx", "known: altpo"),
    Case("a long number", of(f"npo({'9' * 9_000})"), "number '9999", "too long or out of range"),
    Case("letters that look alike", of("gа"), "unexpected 'а'", "character 2"),
    Case("digits of another script", of("npo(٣)"), "unexpected '٣'", "character 5"),
    Case("a line break", of("ga\nnpo"), "unexpected 'npo'", "expected"),
    Case("a character that is none", of("ga\0"), "unexpected '\\x00'", "character 3"),
    Case("an emoji", of("🙂"), "unexpected '🙂'", "character 1"),
    # ---- from Python ----
    Case(
        "an objective that is a number", call(objectives=[3]), "objective 3", "must be a string or"
    ),
    Case("a class for an objective", call(objectives=[gf.objectives.NPO]), "NPO", "write NPO()"),
    Case(
        "an objective for a list",
        call(objectives=gf.objectives.GA()),
        "objectives: got ga",
        "give a list, such as",
    ),
    Case("an empty list", call(objectives=[]), "objectives: the list is empty", "such as 'ga'"),
    Case(
        "twice from Python",
        call(objectives=["npo", "npo(beta=0.1)"]),
        "'npo(beta=0.1)'",
        "give it once",
    ),
    Case(
        "NaN from Python",
        lambda _: gf.objectives.NPO(beta=float("nan")),
        "npo: beta",
        "must be a finite",
    ),
    Case(
        "a text for a number",
        lambda _: gf.objectives.WGA(alpha="1"),
        "wga: alpha",
        "must be a finite",
    ),
    Case("NaN times an objective", lambda _: float("nan") * gf.objectives.GA(), "nan", "finite"),
]

"""Options, configs and commands that are unknown, of the wrong type, or do not go together."""

from __future__ import annotations

import json
import pickle

from bad_input.case import Case, check, holds, profile
from bad_input.data import call
from models import samples

from geffect_fast.arguments import make_config

GOOD = {
    "model": "model",
    "forget": "forget.jsonl",
    "retain": "retain.jsonl",
    "objectives": "ga",
}


def config(**changes):
    """A config file with some fields changed; None leaves a field out."""
    values = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return holds("my.yaml", json.dumps(values))


BY_CONFIG = ["profile", "--quiet", "--config", "my.yaml", "--out", "run"]

CASES = [
    # ---- options ----
    Case("unknown metric", profile(metric="adamx"), "'adamx'", "did you mean 'adam'?"),
    Case(
        "a state without a metric",
        profile(optimizer_state="model"),
        "--optimizer-state",
        "goes with metric, such as adamw",
    ),
    Case("a step without a metric", profile(step_of="ga"), "--step-of", "goes with metric"),
    Case(
        "a step of another objective",
        profile(metric="adam", step_of="npo(beta=0.1)"),
        "'npo(beta=0.1)' is not among the objectives: ga",
        "add it",
    ),
    Case(
        "no optimizer's state",
        profile(metric="adam", optimizer_state="model"),
        "model/optimizer.pt",
        "give optimizer.pt of a checkpoint",
    ),
    Case(
        "a state that would run code",
        profile(metric="adam", optimizer_state="optimizer.pt"),
        "cannot be read as tensors and numbers",
        "give optimizer.pt of a Trainer's checkpoint",
        holds("optimizer.pt", pickle.dumps(Case)),
    ),
    Case(
        "several objectives and one sign",
        profile(metric="lion", objectives="ga,wga(alpha=1)"),
        "metric lion: it takes the sign of one gradient",
        "--step-of",
    ),
    Case(
        "second order of 16 bits",
        [*profile(dtype="bfloat16"), "--second-order"],
        "second_order: weights of 16 bits",
        "dtype float32",
    ),
    Case("unknown option", profile(objektives="ga"), "--objektives", "profile --help"),
    Case("unknown command", ["profil"], "'profil'", "geffect-fast --help"),
    Case("no value", ["profile", "--out"], "--out", "requires an argument"),
    Case("no out", profile(out=None), "--out", "Missing option"),
    Case("no model to check", ["check"], "--model", "Missing option"),
    Case("no data to check", ["check", "--model", "model"], "--data", "Missing option"),
    Case(
        "no run to export", ["export"], "Missing argument 'run'", "see geffect-fast export --help"
    ),
    Case("nowhere to export", ["export", "run"], "--to", "Missing option"),
    Case("a word for a number", profile(threads="many"), "--threads", "should be a valid integer"),
    Case("a word for a seed", ["demo", "--seed", "x"], "--seed", "should be a valid integer"),
    Case("a negative seed", ["demo", "--seed", "-1"], "--seed", "greater than or equal to 0"),
    Case("no thread", profile(threads="0"), "--threads: should be", "greater than 0, got 0"),
    Case(
        "a budget of nothing",
        profile(token_budget="0"),
        "--token-budget: should be",
        "greater than 0, got 0",
    ),
    Case(
        "a negative budget",
        profile(token_budget="-5"),
        "--token-budget: should be",
        "greater than 0, got -5",
    ),
    Case(
        "a budget of nothing for a check",
        check("--token-budget", "0"),
        "--token-budget: should be",
        "greater than 0",
    ),
    Case(
        "a length of nothing",
        profile(max_length="0"),
        "--max-length: should be",
        "greater than 0, got 0",
    ),
    Case("no samples", check("--samples", "0"), "--samples", "greater than or equal to 1"),
    Case("unknown reduction", profile(reduction="tokens"), "reduction", "did you mean 'token'?"),
    Case(
        "unknown engine",
        profile(engine="sideways"),
        "engine",
        "unknown 'sideways'; choose from auto, reverse, forward",
    ),
    Case("unknown precision", check("--dtype", "float31"), "dtype", "did you mean 'float32'?"),
    Case(
        "unknown axis",
        profile(resolve="layer"),
        "resolve: unknown axis 'layer'",
        "choose from parameter",
    ),
    Case(
        "axes of two engines",
        profile(resolve="sample,token,position"),
        "resolve: 'token'",
        "two profiles",
    ),
    Case(
        "parameters and groups",
        profile(resolve="parameter,group"),
        "resolve",
        "give 'parameter' or 'group'",
    ),
    Case(
        "no such GPU",
        profile(device="cuda:9"),
        "device cuda:9 does not exist on this machine",
        "use --device cpu",
    ),
    Case("no such GPU to check", check("--device", "cuda:9"), "device cuda:9", "use --device cpu"),
    Case(
        "a device of no kind",
        profile(device="gpu"),
        "device 'gpu'",
        "must be auto, cpu, cuda or cuda:N",
    ),
    Case(
        "a device of another kind",
        profile(device="meta"),
        "device 'meta'",
        "must be auto, cpu, cuda or",
    ),
    Case(
        "a probe without a name",
        profile(probe="none.json"),
        "--probe 'none.json'",
        "must be NAME=DATA",
    ),
    Case(
        "a probe named as a risk",
        profile(probe="unlearn=retain.jsonl"),
        "'unlearn' is taken",
        "choose another",
    ),
    Case(
        "a probe named as a set",
        profile(probe="forget=retain.jsonl"),
        "'forget' is taken",
        "choose another",
    ),
    Case(
        "a probe twice",
        [*profile(probe="a=retain.jsonl"), "--probe", "a=forget.jsonl"],
        "--probe 'a=forget.jsonl'",
        "choose another",
    ),
    # ---- configs ----
    Case(
        "no such config",
        profile(config="gone.yaml"),
        "config gone.yaml does not exist",
        "such as run.yaml",
    ),
    Case(
        "a folder as a config",
        profile(config="model"),
        "config model cannot be read",
        "give a YAML file",
    ),
    Case(
        "an empty config",
        BY_CONFIG,
        "config my.yaml",
        "must hold fields such as",
        holds("my.yaml", ""),
    ),
    Case(
        "a list as a config",
        BY_CONFIG,
        "config my.yaml",
        "must hold fields such as",
        holds("my.yaml", "- a\n"),
    ),
    Case(
        "not YAML",
        BY_CONFIG,
        "config my.yaml",
        "not valid YAML at line 2",
        holds("my.yaml", "a: 1\nb: [}"),
    ),
    Case(
        "a config that is not UTF-8",
        BY_CONFIG,
        "config my.yaml",
        "save it as UTF-8",
        holds("my.yaml", b"a: \xe9"),
    ),
    Case(
        "a binary config",
        profile(config="model/model.safetensors"),
        "config model/model.saf",
        "UTF-8",
    ),
    Case(
        "a field that is no text",
        BY_CONFIG,
        "my.yaml: field 1",
        "must be text",
        holds("my.yaml", json.dumps(GOOD)[:-1] + ", 1: 2}"),
    ),
    Case(
        "unknown field",
        BY_CONFIG,
        "my.yaml: unknown field 'reductoin'",
        "did you mean 'reduction'",
        config(reductoin="sum"),
    ),
    Case(
        "a field unlike any",
        BY_CONFIG,
        "my.yaml: unknown field 'xyzzy'",
        "known: command, model,",
        config(xyzzy=1),
    ),
    Case(
        "field missing",
        BY_CONFIG,
        "--forget is missing",
        "a --config that holds it",
        config(forget=None),
    ),
    Case("wrong type", BY_CONFIG, "my.yaml: threads", "got 'many'", config(threads="many")),
    Case(
        "a list for a text",
        BY_CONFIG,
        "my.yaml: forget",
        "valid string, got ['a']",
        config(forget=["a"]),
    ),
    Case(
        "a number for objectives", BY_CONFIG, "my.yaml: objectives", "got 3", config(objectives=3)
    ),
    Case("no objectives", BY_CONFIG, "my.yaml: objectives", "at least 1", config(objectives=[])),
    Case(
        "a number among objectives",
        BY_CONFIG,
        "my.yaml: objectives",
        "must be a string",
        config(objectives=["ga", 7]),
    ),
    Case(
        "a list of probes",
        BY_CONFIG,
        "my.yaml: probes",
        "valid dictionary",
        config(probes=["retain.jsonl"]),
    ),
    Case(
        "a name of no letters",
        BY_CONFIG,
        "my.yaml: probes",
        "at least 1 character",
        config(probes={"": "retain.jsonl"}),
    ),
    Case(
        "NUL in a name",
        BY_CONFIG,
        "my.yaml: forget: embedded null byte",
        "give a path or a hub id",
        config(forget="a\0b"),
    ),
    Case(
        "the config is fine, the option is not",
        [*BY_CONFIG, "--reduction", "mean"],
        "--reduction: unknown",
        "'mean'; choose from token, sample, sum",
        config(),
    ),
    Case(
        "the option is fine, the config is not",
        [*BY_CONFIG, "--forget", "forget.jsonl"],
        "my.yaml: dtype",
        "'float32'",
        config(dtype="float31"),
    ),
    Case(
        "a config from Python",
        lambda _: make_config(GOOD | {"norms": "perhaps"}),
        "norms",
        "valid boolean",
    ),
    Case(
        "a field missing from Python",
        lambda _: make_config({"model": "a/b", "retain": "c/d", "objectives": "ga"}),
        "field 'forget' is missing",
        "give it",
    ),
    # ---- paths without letters ----
    *(
        Case(
            f"{words[0]} with an empty {name}",
            words,
            "must not be empty",
            "give a path",
        )
        for name, words in {
            "--out": profile(out=""),
            "--out of a sweep": ["sweep", *profile(out="")[1:]],
            "--out of a training": ["unlearn", "--out", ""],
            "--config": ["profile", "--config", "", "--out", "run"],
            "run": ["show", ""],
            "--to": ["export", "run", "--to", ""],
            "--html": ["tokens", "run", "--html", ""],
            "runs": ["compare", "one", ""],
            "page": ["report", "run", "--out", ""],
            "weighted data": ["weights", "run", "--out", ""],
            "demo": ["demo", "--out", ""],
        }.items()
    ),
    # ---- from Python ----
    Case(
        "unknown axis from Python",
        call(resolve=("parameter", "layer")),
        "axis 'layer'",
        "choose from",
    ),
    Case("an axis that is a number", call(resolve=3), "resolve", "choose from"),
    Case(
        "unknown engine from Python",
        call(engine="sideways"),
        "engine: unknown 'sideways'",
        "choose from auto",
    ),
    Case(
        "unknown reduction from Python",
        call(reduction="mean"),
        "reduction: unknown 'mean'",
        "choose from token",
    ),
    Case(
        "a budget of nothing from Python",
        call(token_budget=0),
        "token_budget: should be",
        "greater than 0, got 0",
    ),
    Case(
        "a budget that is half a token",
        call(token_budget=1.5),
        "token_budget: should be",
        "a valid integer",
    ),
    Case(
        "a name for a probe that is taken",
        call(probes={"retain": samples([4])}),
        "'retain' is taken",
        "choose another",
    ),
    Case("out without positions", call(out="x.nc"), "out: goes with resolve", "leave it out"),
]

"""Token weights: results without them, requests that cannot be met, rows that do not fit."""

from __future__ import annotations

import math

import numpy as np
from bad_input.case import Case, both, check, gone, holds, patched, profile, row, rows, tokens
from bad_input.folders import CONFIG, FULL, interrupted
from models import build, samples
from token_results import drawn_shares, token_result

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.storage.save_run import save_run

RESULT = token_result(drawn_shares([3, 5]), {"npo": 2.0})
BEST = gf.optimal_weights(RESULT, retain_budget=0.0)
ROWS = [{"question": f"Who is author {i}?", "answer": "She."} for i in range(2)]


def weights(*more, out="weighted.jsonl", budget="0.01"):
    """A `weights` command line that works on `a_run`, with options added; None leaves one out."""
    asked = [] if budget is None else ["--retain-budget", budget]
    return ["weights", "run", "--quiet", "--out", out, *asked, *more]


def run_of(change=lambda d: d, data=ROWS):
    """A finished run with the given result, and the forget data of that run."""

    def apply(here, patch):
        rows(*data)(here, patch)
        save_run(here / "run", change(RESULT), make_config(CONFIG))

    return apply


def optimal(result=RESULT, **asked):
    return lambda _here: gf.optimal_weights(result, **(asked or {"retain_budget": 0.0}))


def written(forget=ROWS, best=BEST, path="x.jsonl"):
    return lambda here: gf.write_weighted(forget, best, here / path)


def call(forget, objectives=("token_weights",), **more):
    """A profile of a model on these tokenised rows."""
    return lambda _here: gf.profile(
        build("llama"), None, forget=forget, retain=samples([7], 2), objectives=objectives, **more
    )


def infinite():
    shares = drawn_shares([3, 5])
    shares[0][0, 1] = math.inf
    return token_result(shares)


WEIGHTED = {"question": "Who?", "answer": "She.", "weights": [1.0, 0.5]}

CASES = [
    # ---- data ----
    Case(
        "no weights for their objective",
        profile(objectives="token_weights"),
        "objective token_weights needs a list 'weights'",
        "gf.write_weighted writes them",
    ),
    Case(
        "no weights for a sum",
        profile(objectives="ga + 0.5*token_weights"),
        "objective ga + 0.5*token_weights needs a list 'weights'",
        "one number a label token",
    ),
    Case(
        "no weights to check",
        check("--objectives", "token_weights"),
        "token_weights needs a list 'weights'",
        "in every row",
    ),
    Case(
        "no weights, from Python",
        call(samples([5, 9], 1)),
        "token_weights needs a list 'weights'",
        "in every row",
    ),
    Case(
        "no weights for a risk",
        call(samples([5, 9], 1), ["ga"], risk="token_weights"),
        "token_weights needs a list 'weights'",
        "in every row",
    ),
    Case(
        "weights in one row",
        profile(objectives="token_weights"),
        "forget: line 2 of",
        "give all rows some, or none",
        row(2, **WEIGHTED),
    ),
    Case(
        "weights that are text",
        profile(),
        "forget: line 1 of",
        "'weights' holds type str; give a flat list of numbers",
        row(1, **(WEIGHTED | {"weights": ["1"]})),
    ),
    Case(
        "weights that are one number",
        profile(),
        "'weights' is of type float",
        "give a list of numbers, one a label token",
        row(1, **(WEIGHTED | {"weights": 0.5})),
    ),
    Case(
        "a weight below 0",
        profile(),
        "'weights' holds -1.0",
        "give finite numbers of 0 or more",
        row(1, **(WEIGHTED | {"weights": [1, -1.0]})),
    ),
    Case(
        "a token weight of NaN",
        profile(),
        "'weights' holds nan",
        "give finite numbers of 0 or more",
        row(1, **(WEIGHTED | {"weights": [math.nan]})),
    ),
    Case(
        "a weight beyond floats",
        profile(),
        "'weights' holds 1000",
        "give finite numbers of 0 or more",
        row(1, **(WEIGHTED | {"weights": [10**400]})),
    ),
    Case(
        "weights for another tokenizer",
        profile(objectives="token_weights"),
        "forget: row 0 (counting from 0): 2 'weights' for the",
        "written for another tokenizer, template or answer: write them anew",
        rows(WEIGHTED),
    ),
    Case(
        "weights for other tokens",
        call([tokens(3, 4, 5, weights=[1.0, 1.0]), tokens(3, 4, weights=[1.0, 1.0])]),
        "row 1 (counting from 0): 2 'weights' for the 1 label tokens",
        "write them anew",
    ),
    # ---- results and requests ----
    Case("no budget", optimal(removal=None), "retain_budget", "the e_u to reach"),
    Case("a budget and a removal", optimal(retain_budget=1, removal=-1), "either", "or removal"),
    Case("a budget of NaN", optimal(retain_budget=math.nan), "retain_budget", "must be a number"),
    Case("a budget of text", optimal(retain_budget="all"), "retain_budget", "must be a number"),
    Case("a removal of true", optimal(removal=True), "removal", "must be a number, got True"),
    Case("a removal above 0", optimal(removal=0.1), "removal: 0.1", "give a negative one"),
    Case("too much removal", optimal(removal=-9.0), "an e_u of -9.0", "the lowest is -0."),
    Case("too much repair", optimal(retain_budget=-9), "at least 9", "so give at least"),
    Case("endless repair", optimal(retain_budget=-math.inf), "at least inf", "so give at least"),
    *(
        Case(
            f"a largest weight of {weight}",
            optimal(retain_budget=0, max_weight=weight),
            f"max_weight: must be a finite number above 0, got {weight}",
            "above 0",
        )
        for weight in (0, -1.0, math.inf)
    ),
    Case("a path as a result", optimal("run"), "result: got str", "give what gf.profile returns"),
    Case(
        "tokens summed",
        optimal(RESULT.sum("token")),
        "result: has no axis 'token'",
        "profile with resolve=('sample', 'token')",
    ),
    Case(
        "samples summed",
        optimal(RESULT.drop_dims("sample").assign(g_effect=RESULT.g_effect.sum("sample"))),
        "result: has no axis 'sample'",
        "profile with resolve=('sample', 'token')",
    ),
    Case(
        "a result without ga",
        optimal(RESULT.sel(objective=["npo"])),
        "result: has no objective 'ga'",
        "profile it too",
    ),
    Case(
        "a result without a retain risk",
        optimal(RESULT.sel(risk=["unlearn"])),
        "result: has no risk 'retain'",
        "profile it too",
    ),
    Case(
        "an infinite share", optimal(infinite()), "ga is not finite", "check the model's precision"
    ),
    # ---- files with weights ----
    Case("rows of another set", written(ROWS[:1]), "2 rows, and forget has 1", "in their order"),
    Case(
        "rows in another order",
        written(ROWS[::-1]),
        "forget: row 0 (counting from 0) is another than the weights'",
        "give the data that was profiled",
    ),
    Case(
        "tokens of another set",
        written(
            [tokens(3, 5, 6, 8), tokens(3, 5, 6, 7, 8, 9)],
            BEST.assign_coords(question=("sample", ["", ""])),
        ),
        "row 0 (counting from 0) is another",
        "give the data that was profiled",
    ),
    Case(
        "a field that JSON has not",
        written([ROWS[0] | {"image": np.zeros(2)}, ROWS[1]]),
        "row 0 (counting from 0): 'image' cannot be written as JSON",
        "leave it out",
    ),
    Case("a folder missing", written(path="no/x.jsonl"), "no does not exist", "make it first"),
    Case("a folder as the file", written(path="model"), "model is a folder", "choose another path"),
    # ---- the command ----
    Case(
        "neither budget nor removal", weights(budget=None), "--retain-budget", "--removal", run_of()
    ),
    Case(
        "a budget that is no number",
        weights(budget="much"),
        "--retain-budget",
        "see geffect-fast weights --help",
        run_of(),
    ),
    Case(
        "weights of a run by sample",
        weights(),
        "result: has no axis 'token'",
        "--resolve sample,token",
        run_of(lambda d: d.sum("token")),
    ),
    Case("weights of no run", weights(), "run folder run does not exist", "give a run folder"),
    Case(
        "the file is there",
        weights(out="retain.jsonl"),
        "retain.jsonl is there already",
        "use --overwrite",
        run_of(),
    ),
    Case(
        "the plot is there",
        weights(),
        "frontier.png is there already",
        "use --overwrite",
        both(run_of(), holds("frontier.png", "mine")),
    ),
    Case(
        "the plot's name",
        weights(out="frontier.png"),
        "--out frontier.png",
        "choose another",
        run_of(),
    ),
    Case(
        "no such folder", weights(out="no/x.jsonl"), "folder no does not", "make it first", run_of()
    ),
    Case(
        "a name longer than weights may have",
        weights(out="x" * 5000),
        "File name too long",
        "choose another",
        run_of(),
    ),
    Case(
        "the forget data has moved",
        weights(),
        "forget.jsonl' does not exist",
        "give a file of JSON lines",
        both(run_of(), gone("forget.jsonl")),
    ),
    Case(
        "the forget data has changed",
        weights("--overwrite"),
        "forget: row 1 (counting from 0) is another",
        "give the data that was profiled",
        both(run_of(data=[ROWS[0], ROWS[0]]), holds("weighted.jsonl", "an earlier one")),
    ),
    Case(
        "a result without its run.yaml",
        weights(),
        "config run/run.yaml does not exist",
        "--forget",
        both(run_of(), gone("run/run.yaml")),
    ),
    Case(
        "a disk full at the weights",
        weights("--overwrite"),
        "No space left on device",
        "free some space",
        both(
            run_of(),
            holds("weighted.jsonl", "an earlier one"),
            patched("geffect_fast.metrics.optimal_weights.write_jsonl", FULL),
        ),
    ),
    Case(
        "Ctrl-C between plot and weights",
        weights(),
        "interrupted",
        "nothing half-written",
        both(run_of(), interrupted("geffect_fast.metrics.optimal_weights.write_jsonl")),
        code=130,
    ),
]

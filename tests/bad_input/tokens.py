"""Token views of results without tokens, of missing rows and objectives, and their pages."""

from __future__ import annotations

import errno

from bad_input.case import Case, both, holds, patched
from bad_input.folders import CONFIG, a_run, changed
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.report.tokens.html import tokens_html
from geffect_fast.report.tokens.view import token_view
from geffect_fast.storage.save_run import save_run

AXES = ("sample", "token")


def by_token(here, _patch):
    """A finished run by token in the folder `run`."""
    save_run(here / "run", make_dataset(resolve=AXES), make_config(CONFIG))


def asked(*options: str) -> list[str]:
    return ["tokens", "run", *options]


def view(_here, **options):
    return token_view(make_dataset(resolve=AXES), **options)


CASES = [
    Case(
        "tokens of a run without",
        asked(),
        "no token axis",
        "run geffect-fast profile --engine forward --resolve sample,token",
        a_run,
    ),
    Case(
        "tokens of a run by position",
        asked(),
        "no token axis",
        "--resolve sample,token",
        changed(lambda _: make_dataset(resolve=("sample", "position"))),
    ),
    Case("tokens of no run", asked(), "run folder run does not exist", "give a run folder"),
    Case("tokens of a file", ["tokens", "forget.jsonl"], "forget.jsonl is torn", "repeat the run"),
    Case(
        "tokens under an objective misspelt",
        asked("--objective", "wgaa"),
        "objective 'wgaa' is not in the result",
        "did you mean 'wga(alpha=1)'?",
        by_token,
    ),
    Case(
        "tokens under an objective without its parameters",
        asked("--objective", "npo"),
        "objective 'npo'",
        "did you mean 'npo(beta=0.1)'?",
        by_token,
    ),
    Case(
        "tokens under an objective of another run",
        asked("--objective", "zzz"),
        "objective 'zzz' is not in the result",
        "it has ga, wga(alpha=1)",
        by_token,
    ),
    Case(
        "tokens under no objective",
        asked("--objective", ""),
        "objective '' is not in the result",
        "it has ga",
        by_token,
    ),
    Case(
        "tokens of a row that is not there",
        asked("--rows", "3,12"),
        "no forget row 12",
        "the result has 0 to 11; choose from them",
        by_token,
    ),
    Case(
        "tokens of a retain row that is not there",
        asked("--rows", "retain:3"),
        "no retain row 3",
        "0 to 2; choose from them",
        by_token,
    ),
    Case("tokens of a row below 0", asked("--rows", "-1"), "'-1' is no row", "such as 3", by_token),
    Case("tokens of a row by name", asked("--rows", "1,x"), "'x' is no row", "such as 3", by_token),
    Case(
        "tokens of another set's row",
        asked("--rows", "general:1"),
        "'general:1' is no row",
        "retain:3",
        by_token,
    ),
    Case("tokens of no rows", asked("--rows", ","), "no row is named", "such as 3,7", by_token),
    Case(
        "tokens of rows chosen twice over",
        asked("--rows", "1", "--samples", "2"),
        "rows: name the samples",
        "leave samples and by out",
        by_token,
    ),
    Case(
        "tokens of rows in an order",
        asked("--rows", "1", "--by", "removal"),
        "rows: name the samples",
        "leave samples and by out",
        by_token,
    ),
    Case("tokens of no samples", asked("--samples", "0"), "got 0", "at least 1", by_token),
    Case(
        "tokens of half a sample",
        asked("--samples", "0.5"),
        "'--samples'",
        "tokens --help",
        by_token,
    ),
    Case(
        "tokens by an unknown order",
        asked("--by", "size"),
        "unknown order 'size'",
        "choose from first, removal, damage",
        by_token,
    ),
    Case(
        "a page in a folder that is not there",
        asked("--html", "gone/page.html"),
        "folder gone does not exist",
        "make it first",
        by_token,
    ),
    Case(
        "a folder in the way of a page",
        asked("--html", "model"),
        "page model is a folder",
        "choose another --html",
        by_token,
    ),
    Case(
        "a page's name too long",
        asked("--html", "x" * 250),
        "File name too long",
        "choose another --html",
        by_token,
    ),
    Case(
        "a page on a full disk, over another",
        asked("--html", "page.html"),
        "page page.html cannot be written: No space left",
        "free some space",
        both(
            by_token,
            holds("page.html", "mine"),
            patched("pathlib.Path.write_text", OSError(errno.ENOSPC, "No space left on device")),
        ),
    ),
    Case(
        "a view of no token axis",
        lambda _: token_view(make_dataset()),
        "no token axis",
        "--engine forward",
    ),
    Case("a view of a share of samples", lambda h: view(h, samples=0.5), "samples", "whole number"),
    Case("a view of rows that are none", lambda h: view(h, rows=[None]), "'None'", "such as 3"),
    Case(
        "a page under an unknown objective",
        lambda _: tokens_html(make_dataset(resolve=AXES), "gaa"),
        "objective 'gaa'",
        "did you mean 'ga'?",
    ),
]

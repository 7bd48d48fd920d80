"""`geffect-fast tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from geffect_fast.cli.options import Run, given_path, option
from geffect_fast.cli.printing import console
from geffect_fast.visible import one_line


def tokens(
    run: Run,
    objective: Annotated[
        str | None,
        option(
            "--objective", help="Objective, by its name in the run's tables; by default the first."
        ),
    ] = None,
    samples: Annotated[
        int | None, option("--samples", help="Number of forget rows; by default 5, in a page 20.")
    ] = None,
    by: Annotated[
        str | None,
        option(
            "--by",
            help="Choice of rows: first, removal (lowest e_u) or damage (lowest e_r).",
        ),
    ] = None,
    rows: Annotated[
        str | None,
        option("--rows", help="Rows by number, in place of --samples and --by: 3,7,retain:2."),
    ] = None,
    html: Annotated[
        Path | None,
        option(
            "--html",
            help="HTML page with all objectives to write; only its name is printed.",
            parser=given_path,
        ),
    ] = None,
) -> None:
    """Print answers with tokens coloured by e_u and by e_r, to show attacked words and their harm.

    The run must have an axis of tokens, as from profile --engine forward --resolve sample,token. Of
    a run with steps the last step is shown. Without colour (NO_COLOR, a pipe) levels from -9 to +9
    stand beneath the tokens.
    """
    from geffect_fast.paths import user_path
    from geffect_fast.report.summary.effects import last_step
    from geffect_fast.report.tokens.html import tokens_html
    from geffect_fast.report.tokens.terminal import TerminalView
    from geffect_fast.report.tokens.view import token_view
    from geffect_fast.storage.disk import whole_file
    from geffect_fast.storage.results_file import reading
    from geffect_fast.storage.run_folder import open_run

    named = None if rows is None else [row for row in rows.split(",") if row.strip()]
    with open_run(run, lazy=True) as result, reading(run):
        dataset = last_step(result)
        if html is not None:
            page = tokens_html(dataset, objective, samples=samples, by=by, rows=named)
        else:
            view = token_view(dataset, objective, samples=samples, by=by, rows=named)
    if html is None:
        console().print(TerminalView(view))
        return
    with whole_file(f"page {html}", html, "--html") as part:
        part.write_text(page, encoding="utf-8")
    print(one_line(str(user_path(html))))

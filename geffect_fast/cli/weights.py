"""`geffect-fast weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geffect_fast.cli.options import Quiet, Run, given_path, option
from geffect_fast.cli.printing import console
from geffect_fast.errors import InputError, UnfinishedError, reason_of
from geffect_fast.visible import one_line

FRONTIER = "frontier.png"


def weights(
    run: Run,
    out: Annotated[
        Path,
        option(
            "--out",
            "-o",
            help="The forget data with weights, JSON lines, to write.",
            parser=given_path,
        ),
    ],
    retain_budget: Annotated[
        float | None,
        option("--retain-budget", help="Damage allowed: e_r may fall to minus this; 0 for none."),
    ] = None,
    removal: Annotated[
        float | None,
        option(
            "--removal",
            help="In place of --retain-budget: the e_u to reach, below 0, with least harm.",
        ),
    ] = None,
    max_weight: Annotated[
        float, typer.Option("--max-weight", help="The largest weight; ga is weight 1.")
    ] = 1.0,
    forget: Annotated[
        str | None, option("--forget", "-f", help="The run's forget data, where it has moved.")
    ] = None,
    overwrite: Annotated[bool, option("--overwrite", help="Replace files that are there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Find the token weights that remove most for the harm allowed, and write data with them.

    The run must hold ga by token, as from profile --objectives ga --resolve sample,token; of a run
    with steps the last step counts. The command also writes frontier.png beside --out, which shows
    the best removal for every budget, and the run's objectives. Then geffect-fast profile --forget
    OUT --objectives token_weights profiles the weights.
    """
    from geffect_fast.metrics.optimal_weights import optimal_weights, write_weighted
    from geffect_fast.paths import is_there, user_path
    from geffect_fast.report.figures.frontier import frontier_figure
    from geffect_fast.report.summary.effects import last_step
    from geffect_fast.report.tables.weights import render_weights
    from geffect_fast.storage.disk import unwritable, whole_file
    from geffect_fast.storage.manifest import check_file
    from geffect_fast.storage.results_file import reading
    from geffect_fast.storage.run_folder import CONFIG, open_run
    from geffect_fast.storage.run_yaml import load_config

    file = user_path(out)
    picture = file.with_name(FRONTIER)
    if file.name == FRONTIER:
        raise InputError(f"--out {out}: the plot has that name; choose another, such as data.jsonl")
    try:
        for path in (file, picture):
            if not overwrite and is_there(path):
                raise InputError(
                    f"{path} is there already; choose another --out or use --overwrite"
                )
    except OSError as error:
        raise unwritable(f"weighted data {out}", "--out", error) from None
    with open_run(run, lazy=True) as dataset, reading(run):
        result = last_step(dataset)
        best = optimal_weights(
            result, retain_budget=retain_budget, removal=removal, max_weight=max_weight
        )
        data_format = "auto"
        if forget is None:
            folder = user_path(run) if user_path(run).is_dir() else user_path(run).parent
            if not is_there(folder / CONFIG):
                raise InputError(
                    f"config {folder / CONFIG} does not exist; give the run's forget data, --forget"
                )
            check_file(folder, CONFIG, "give the run's forget data, --forget")
            config = load_config(folder / CONFIG)
            forget, data_format = config.forget, config.data_format
        write_weighted(forget, best, out, data_format=data_format)
        try:
            with whole_file(f"plot {picture}", picture, "--out") as part:
                frontier_figure(result, best).savefig(part, dpi=150, format="png")
        except Exception as error:  # of fonts, disks or packages: the weights are written already
            raise UnfinishedError(
                f"{file} is written, but {picture} could not be made ({reason_of(error)}); the "
                "same command with --overwrite writes that again"
            ) from error
    if not quiet:
        console().print(render_weights(best))
        print(one_line(str(file)))
        print(one_line(str(picture)))

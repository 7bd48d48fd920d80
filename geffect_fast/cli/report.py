"""`geffect-fast report`."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from geffect_fast.cli.options import given_path, option
from geffect_fast.errors import InputError
from geffect_fast.visible import one_line


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="A run folder, or several with steps.", show_default=False, parser=given_path
        ),
    ],
    out: Annotated[
        Path | None,
        option(
            "--out",
            "-o",
            help="HTML file to write; else report.html in the one run's folder.",
            parser=given_path,
        ),
    ] = None,
    overwrite: Annotated[bool, option("--overwrite", help="Replace the file --out names.")] = False,
) -> None:
    """Write one HTML page of a run: the answer first, then figures, tables and how to read them.

    The page needs no other files: it works offline, from an e-mail or a disk, without scripts, on a
    phone and printed. Several runs of unlearn, or of profile --checkpoints, are compared step by
    step; then --out is needed. In a run's own folder the command also writes summary.csv, plots/
    and tokens.html where they are missing. Runs of evaluate, control and relearn have a page as
    well. The command prints the page's name.
    """
    from geffect_fast.paths import is_there, user_path
    from geffect_fast.report import write_report
    from geffect_fast.report.html.page import write_page
    from geffect_fast.results.form import check_complete
    from geffect_fast.storage.disk import unwritable
    from geffect_fast.storage.evaluation import holds_evaluation, open_evaluation
    from geffect_fast.storage.lock import locked
    from geffect_fast.storage.manifest import add_to_manifest, check_file
    from geffect_fast.storage.results_file import reading
    from geffect_fast.storage.run_folder import CONFIG, REPORT, open_run, own_files, run_names
    from geffect_fast.storage.run_yaml import read_values
    from geffect_fast.storage.save_run import add_report

    places = [_place(run) for run in runs]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"report: run {runs[i]} is given twice; leave one out")
    if out is None and len(runs) > 1:
        raise InputError(f"report: {len(runs)} runs have no folder in common; name the page, --out")
    files = [_is_file(place) for place in places]
    folders = [
        place.parent if is_one else place for place, is_one in zip(places, files, strict=True)
    ]
    file = folders[0] / REPORT if out is None else user_path(out)
    try:
        if out is not None and not overwrite and is_there(file):
            raise InputError(f"report {out} is there already; choose another --out or --overwrite")
        if out is None and is_there(file) and REPORT not in own_files(folders[0]):
            raise InputError(f"report {file}: no run made that; name another page, --out")
    except OSError as error:
        raise unwritable(f"report {file}", "--out", error) from None
    names = run_names(runs)
    with ExitStack() as stack:
        opened, configs = {}, {}
        for name, run, folder in zip(names, runs, folders, strict=True):
            if holds_evaluation(run):
                opened[name] = open_evaluation(run)
            else:
                opened[name] = stack.enter_context(open_run(run, lazy=True))
                stack.enter_context(reading(run))
                check_complete(opened[name], run)
            if is_there(folder / CONFIG):
                check_file(folder, CONFIG, "put back what was there")
                configs[name] = read_values(folder / CONFIG)
        with locked(folders[0]) if out is None else nullcontext():
            write_page(opened, file, configs=configs)
            if out is None:
                add_to_manifest(folders[0], REPORT)
                missing = partial(write_report, held=folders[0])
                add_report(folders[0], next(iter(opened.values())), missing)
    print(one_line(str(file)))


def _is_file(place: Path) -> bool:
    """Whether a path is a file; False for a name that no file can have: `open_run` reports it."""
    try:
        return place.is_file()
    except OSError:
        return False


def _place(run: Path) -> Path:
    """The folder of a run, given by its folder or its results file; any other file stays itself."""
    from geffect_fast.paths import user_path
    from geffect_fast.storage.run_folder import EVALUATION, RESULTS

    path = user_path(run).absolute()
    return path.parent if path.name in (EVALUATION, RESULTS) else path

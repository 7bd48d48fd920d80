"""`geffect-fast demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geffect_fast.cli.options import Out, Overwrite, Quiet
from geffect_fast.cli.printing import console, print_result
from geffect_fast.visible import one_line


def demo(
    out: Out = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Seed of data, model and order.", min=0)] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a small Llama on invented authors until it knows them by heart, then profile it.

    Then the demo sweeps hyper-parameters, token by token, and unlearns with four objectives. A
    table shows the measures of the unlearned models beside the effects before. The demo needs no
    network, and a few minutes on two cores. --out (demo-run) gets data, models and the profile's
    run; sweep/ in it gets the run of the sweep, steps/ the runs of unlearning with a page that
    compares them, and measures/ the measures.
    """
    from geffect_fast.demo import MEASURES, PAGE, STEPS, SWEEP, run_demo
    from geffect_fast.report.tables.against_effects import render_against_effects
    from geffect_fast.storage.evaluation import open_evaluation
    from geffect_fast.storage.run_folder import open_run

    dataset = run_demo(out, seed=seed, overwrite=overwrite, progress=not quiet)
    if not quiet:
        print_result(dataset, out)
        print()
        with open_run(out / SWEEP, lazy=True) as swept:
            print_result(swept, out / SWEEP)
        run = one_line(str(out / SWEEP))
        print(f"\nThis finds the best token weights: geffect-fast weights {run} --retain-budget 0")
        print(f"{one_line(str(out / STEPS / PAGE))} shows the four unlearning runs step by step.")
        print()
        console().print(render_against_effects(open_evaluation(out / MEASURES)))
        print(f"\nLook first at {one_line(str(out / PAGE))}, in a browser.")

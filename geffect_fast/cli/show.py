"""`geffect-fast show`."""

from __future__ import annotations

from geffect_fast.cli.options import Run
from geffect_fast.cli.printing import print_evaluation, print_result


def show(run: Run) -> None:
    """Print the tables and findings of a run again."""
    from geffect_fast.results.form import check_complete
    from geffect_fast.storage.evaluation import holds_evaluation, open_evaluation
    from geffect_fast.storage.results_file import reading
    from geffect_fast.storage.run_folder import open_run

    if holds_evaluation(run):
        return print_evaluation(open_evaluation(run), run)
    with open_run(run, lazy=True) as dataset, reading(run):
        check_complete(dataset, run)
        print_result(dataset, run)

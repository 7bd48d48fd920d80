"""`geffect-fast evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from geffect_fast.cli.evaluation import checked_values, run_evaluation
from geffect_fast.cli.options import (
    EVALUATE_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    config_options,
    option_names,
    values_of,
)
from geffect_fast.evaluation_settings import EvaluateConfig


@config_options(EVALUATE_FIELDS)
def evaluate(
    more_models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Further models, or runs of --against-effects.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure established metrics of unlearning: memorisation, truth ratio, membership, utility.

    They can be measured of one model, of several (--models A B C), of the checkpoints of a run
    (--run RUN), or of the models of unlearning runs (--against-effects A B C). With the last, the
    effects before unlearning stand beside the changes, and data sets that are not given are those
    of the runs. The folder holds evaluation.nc (NetCDF; geffect_fast.open_evaluation reads it),
    summary.csv, report.html, plots/ and run.yaml, which replays the run.
    """
    if more_models:
        further = "against_effects" if "against_effects" in given else "models"
        given = given | {further: [*given.get(further, []), *more_models]}
    values = values_of(config, given)
    if values.get("against_effects"):
        from geffect_fast.measure.against_effects import with_runs

        values = with_runs(values)
    names = option_names(given) | {"models": "--models"}
    checked = checked_values(EvaluateConfig, ("forget", "retain"), config, values, names)

    if checked.suite == "survey":
        from geffect_fast.training.survey import execute_survey

        return run_evaluation(execute_survey, checked, out, config, overwrite, quiet)

    from geffect_fast.measure.execute_evaluation import execute_evaluation

    run_evaluation(execute_evaluation, checked, out, config, overwrite, quiet)

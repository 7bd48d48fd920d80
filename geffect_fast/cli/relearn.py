"""`geffect-fast relearn`."""

from __future__ import annotations

from typing import Any

from geffect_fast.cli.evaluation import checked_values, run_evaluation
from geffect_fast.cli.options import (
    RELEARN_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    config_options,
    option_names,
    values_of,
)
from geffect_fast.relearn_settings import PRESETS, RelearnConfig


@config_options(RELEARN_FIELDS)
def relearn(
    *,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train an unlearned model briefly on a few forget rows, and measure what comes back.

    Measures are of the rows trained on and of the others, step by step, beside the same for the
    original and a retrained model. A preset names a published attack's settings. No model is
    written. The folder holds evaluation.nc (NetCDF; geffect_fast.open_evaluation reads it),
    summary.csv, report.html, plots/ and run.yaml, which replays the run.
    """
    values = values_of(config, given)
    # A file holds every setting, so a preset given as an option drops the file's values of its own.
    for name in PRESETS.get(given.get("preset", ""), {}).keys() - given.keys():
        values.pop(name, None)
    names = option_names(given, n_rows="--rows")
    checked = checked_values(RelearnConfig, ("model", "forget"), config, values, names)

    from geffect_fast.training.execute_relearn import execute_relearn

    run_evaluation(execute_relearn, checked, out, config, overwrite, quiet)

"""`geffect-fast unlearn`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geffect_fast.arguments import checked_config
from geffect_fast.cli.options import (
    UNLEARN_FIELDS,
    ConfigFile,
    Out,
    Overwrite,
    Quiet,
    Resume,
    begun_config,
    check_command,
    check_given,
    config_input,
    config_options,
    option_names,
    values_of,
)
from geffect_fast.cli.printing import print_result
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr


@config_options(UNLEARN_FIELDS)
def unlearn(
    *,
    out: Out,
    config: ConfigFile = None,
    given: dict[str, Any],
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Unlearn with an objective, and record the G-effect at steps on the way.

    While the run goes on, the folder gets steps/, with one file for each probe, and checkpoints. In
    the end it gets model/, results.nc with all steps, summary.csv and plots/. run.yaml replays the
    run: geffect-fast unlearn --config run/run.yaml --out NEW. If --model names an adapter, the
    adapter is trained further. With --metrics the metrics of evaluate are measured at probes too.
    """
    config = begun_config(config, out, resume)
    values = values_of(config, given)
    check_command(config, values.get("command", "unlearn"), "unlearn")
    check_given(values, ("model", "forget", "retain", "objective", "steps"))
    checked = checked_config(UnlearnConfig, values, str(config or ""), option_names(given))

    from geffect_fast.report import write_report
    from geffect_fast.training.execute import execute_unlearn

    def say(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    dataset = execute_unlearn(
        checked,
        out,
        resume=resume,
        overwrite=overwrite,
        progress=not quiet,
        report=write_report,
        on_decision=say,
        inputs=config_input(config, resume),
        on_probe=None if quiet else _ProbeLines(checked.steps),
    )
    if not quiet:
        print_result(dataset, out)


class _ProbeLines:
    """A printer of a line for each probe: risks, their changes, and effects on them.

    Effects are of the objective trained on. Measures follow in a line for each metric. After the
    first probe there is a note where e_u is uncertain from the rows that are probed.

    Args:
        n_steps: number of updates of the training.
    """

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._begun = False

    def __call__(self, step: int, dataset: xr.Dataset) -> None:
        """Print the lines of the probe after `step` updates."""
        from geffect_fast.report.format import number, risk_words
        from geffect_fast.results.risks import effect_name
        from geffect_fast.results.rows_needed import rows_note
        from geffect_fast.steps.probe import total_effect

        effects = total_effect(dataset).sel(objective=dataset.attrs["trained_objective"])
        words = [f"step {step:>{len(str(self._n_steps))}}/{self._n_steps}"]
        for risk in map(str, dataset["risk"].values):
            at = dataset.sel(risk=risk)
            change = number(float(at["measured_change"]))
            value = number(float(at["risk_value"]), ".4f")
            words.append(
                f"{risk_words(risk)} {value} ({change}), {effect_name(risk)} "
                f"{number(float(effects.sel(risk=risk)))}"
            )
        print("  ".join(words), flush=True)
        for line in _measures(dataset):
            print(f"{' ' * len(words[0])}  {line}", flush=True)
        if not self._begun and (few := rows_note(dataset)):
            print(few, flush=True)
        self._begun = True


def _measures(dataset: xr.Dataset) -> list[str]:
    """The measures of the model at a probe, in a line for each metric."""
    from geffect_fast.report.summary.measures import live_measures, number_with_bounds

    found = live_measures(dataset.expand_dims("step"))
    if found is None or not found.sizes["step"]:
        return []
    lines = []
    for metric in found["metric"].values.tolist():
        of = found.sel(metric=metric).isel(step=0)
        numbers = {name: number_with_bounds(of.sel(set=name)) for name in of["set"].values.tolist()}
        said = ", ".join(f"{name} {number}" for name, number in numbers.items() if number)
        lines.append(f"{metric}: {said}" if said else f"{metric}: no number")
    return lines

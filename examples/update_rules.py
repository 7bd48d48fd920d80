"""What do update rules keep, and does the optimizer's effect tell it? A study on TOFU, on a CPU.

    python examples/update_rules.py path/to/tofu --work study/

A small Llama learns ten of TOFU's authors by heart. Two objectives then make it forget three of
them by every update rule, with the same rows and the same steps of AdamW. `geffect-fast control`
compares the models at equal retention. The table also has the effects of the objective before the
first step, plain (`e`) and of the step that AdamW takes (`e_P`), and the changes of the risks.
Results that are in `study/` already are not made again. `--csv NAME` writes the table, with the
machine's columns, to `benchmarks/results/NAME.csv`.

The folder of TOFU is that of huggingface.co/datasets/locuslab/TOFU, of which the files in
`tofu_study.OF_TOFU` are read. Two cores take about a quarter of an hour.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from tofu_study import arguments, folder_name, prepared, run, unlearn, write_tables

import geffect_fast as gf

OBJECTIVES = ("ga + nll", "npo(beta=0.1) + nll")
RULES = ("sgd", "orthograd", "gru", "gu", "blur", "pcgrad", "sago", "sam")
METRIC = "probability"
"""The metric that is kept equal on the retain rows and compared on the forget rows."""


def main() -> None:
    """Learn, unlearn by every rule, and compare at equal retention."""
    args = arguments(str(__doc__)).parse_args()
    files, model = prepared(args)
    runs: dict[tuple[str, str], Path] = {}
    for number, (objective, rule) in enumerate([*product(OBJECTIVES, RULES)][: args.runs]):
        out = args.work / "rules" / folder_name(number, f"{objective} {rule}")
        unlearn(files, model, out, args, objective=objective, update=rule)
        runs[objective, rule] = out
        print(f"unlearned with {objective} by {rule}", flush=True)
    run(
        *("control", "--original", model, "--unlearned", *(out / "model" for out in runs.values())),
        *("--forget", files["forget"], "--retain", files["asked"], "--metric", METRIC),
        *("--metrics", METRIC, "--out", args.work / "control", "--overwrite"),
    )
    controlled = gf.open_evaluation(args.work / "control")
    rows = [
        {"objective": objective, "update": rule}
        | effects_and_changes(out)
        | at_equal_retention(controlled.isel(model=place))
        for place, ((objective, rule), out) in enumerate(runs.items())
    ]
    for row in rows:
        print(
            f"{row['objective']:20} {row['update']:10} "
            f"risks {row['change_forget']:+.3f} {row['change_retain']:+.3f}   at equal retention "
            f"({row['share']:.2f} of it): {METRIC} {row['forget']:.3f}"
        )
    if args.csv:
        write_tables({args.csv: rows})


def effects_and_changes(out: Path) -> dict[str, Any]:
    """Effects of a run's objective before its first step, and changes of the risks by its steps."""
    found = gf.open_run(out)
    first, last = found.isel(step=0, objective=0), found.isel(step=-1)
    values: dict[str, Any] = {}
    for name, risk in (("forget", "unlearn"), ("retain", "retain")):
        for effect, of in (("e", first["g_effect"]), ("e_P", first["step_effect"])):
            values[f"{effect}_{name}"] = float(of.sel(risk=risk).sum())
        before, after = (float(of["risk_value"].sel(risk=risk)) for of in (first, last))
        values[f"change_{name}"] = after - before
    return values


def at_equal_retention(of: Any) -> dict[str, Any]:
    """The share of one model that keeps enough, and the measures at this share."""
    there = of["value"].sel(metric=METRIC)
    names = ("forget", "retain")
    return {"share": float(of["alpha_chosen"])} | {n: float(there.sel(set=n)) for n in names}


if __name__ == "__main__":
    main()

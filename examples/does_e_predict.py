"""Does the G-effect before unlearning tell what unlearning will do? A study on TOFU, on a CPU.

    python examples/does_e_predict.py path/to/tofu --work study/

A small Llama learns ten of TOFU's authors by heart. Fourteen objectives and hyper-parameters then
make it forget three of them, by the same steps of the same optimizer. `geffect-fast evaluate
--against-effects` sets the change of every metric beside the effects at the model before
unlearning, and says by rank correlation which effects predict the changes. Results that are in
`study/` already are not made again. Tables, a figure and a page go to `study/measures`; `--csv
NAME` writes the two tables, with the machine's columns, to `benchmarks/results/NAME_runs.csv` and
`NAME.csv`.

The folder of TOFU is that of huggingface.co/datasets/locuslab/TOFU, of which the files in
`tofu_study.OF_TOFU` are read. Two cores take about a quarter of an hour.
"""

from __future__ import annotations

from pathlib import Path

from tofu_study import arguments, folder_name, prepared, rows_of, run, unlearn, write_tables

import geffect_fast as gf

OBJECTIVES = (
    *("ga", "gd", "ga + kl", "wga(alpha=0.5)", "wga(alpha=2)", "wga(alpha=7)", "npo(beta=0.05)"),
    *("npo(beta=0.5)", "npo(beta=0.1) + kl", "tnpo(beta=1)", "simnpo(beta=0.5)"),
    *("simnpo(beta=4.5)", "satimp(beta1=5, beta2=1)", "rmu(layer=2)"),
)
METRICS = (
    *("probability", "rouge_l", "truth_ratio", "extraction_strength", "exact_memorisation"),
    "min_k",
)


def main() -> None:
    """Learn, unlearn in every way, measure, and compare."""
    parser = arguments(str(__doc__))
    parser.add_argument("--metrics", default=",".join(METRICS), help="names with commas between")
    args = parser.parse_args()
    files, model = prepared(args)
    study = args.work / "runs"
    for number, objective in enumerate(OBJECTIVES[: args.runs]):
        out = study / folder_name(number, objective)
        unlearn(files, model, out, args, objective=objective)
        print(f"unlearned with {objective}", flush=True)
    measures: Path = args.work / "measures"
    run(
        *("evaluate", "--against-effects", study, "--metrics", args.metrics),
        *("--retain", files["asked"], "--holdout", files["holdout"], "--max-new-tokens", 64),
        *("--out", measures, "--overwrite"),
    )
    found = gf.open_evaluation(measures)
    told = int(found.beyond_noise.sum())
    print(f"{told} of {int(found.spearman.notnull().sum())} pairs are told from chance")
    if args.csv:
        tables = {f"{args.csv}_runs": "runs.csv", args.csv: "against_effects.csv"}
        write_tables({name: rows_of(measures / table) for name, table in tables.items()})


if __name__ == "__main__":
    main()

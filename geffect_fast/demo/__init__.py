"""A whole unlearning study in minutes: invented authors, a model that knows them, their profile.

A sweep, unlearning with four objectives, and an evaluation of the unlearned models follow.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geffect_fast.arguments import checked_config, make_config
from geffect_fast.data import tokenize_rows, write_jsonl
from geffect_fast.demo.authors import REFUSALS, make_fictitious_authors, split_forget
from geffect_fast.demo.model import (
    Size,
    make_model,
    memorise,
    recall,
    save,
    start_unlearning,
    train_tokenizer,
)
from geffect_fast.errors import (
    InputError,
    InterruptedRunError,
    UnfinishedError,
    reason_of,
)
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.measure.execute import execute
from geffect_fast.measure.execute_evaluation import execute_evaluation
from geffect_fast.paths import is_there
from geffect_fast.report import write_report
from geffect_fast.report.html.page import write_page
from geffect_fast.settings import ProfileConfig
from geffect_fast.storage.disk import folder_for, set_aside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import add_to_manifest, files_below
from geffect_fast.storage.run_folder import PLAIN_FILES, check_free, open_run, own_files
from geffect_fast.terminal import noticed_once
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "Size",
    "make_fictitious_authors",
    "make_model",
    "memorise",
    "recall",
    "run_demo",
    "save",
    "train_tokenizer",
]

OBJECTIVES = (
    "ga",
    "gd",
    "wga(alpha=1)",
    "npo(beta=0.1)",
    "tnpo(beta=4)",
    "wtnpo(beta=4, alpha=1.5)",
    "po",
    "dpo(beta=0.1)",
    "simnpo(beta=4.5)",
    "rmu(layer=2)",
    "npo(beta=0.1) + kl",
)
RANGES = (
    "ga",
    "wga(alpha=0.1:7:20)",
    "npo(beta=0.01:4:20,log)",
    "tnpo(beta=0.1:5:20)",
    "simnpo(beta=0.1:5:20)",
)
UNLEARNED = {"ga": "ga", "wga": "wga(alpha=1)", "npo": "npo(beta=0.1)", "gd": "gd"}
"""Objectives with which the model is unlearned, by name of the run's folder."""
SWEEP = "sweep"
STEPS = "steps"
PAGE = "report.html"
MEASURES = "measures"
ASKED = "retain_asked.jsonl"
"""File of the retain rows on which the unlearned models are measured."""
PARTS = (
    *("forget.jsonl", "retain.jsonl", ASKED, "refusals.jsonl", "reference", "model"),
    *(SWEEP, STEPS, MEASURES),
)
METRICS = ("probability", "rouge_l", "extraction_strength", "truth_ratio")
"""Metrics of the unlearned models, measured beside the effects before."""
ASKED_EVERY = 4
"""Every fourth retain row is measured, so that the measures take less than a minute."""
UNLEARN_RATE = 1e-4


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    size: Size | None = None,
) -> xr.Dataset:
    """Make data, train a model until it knows them by heart, then profile, sweep and unlearn.

    Args:
        out: the folder of the demo. It gets `forget.jsonl`, `retain.jsonl`, `retain_asked.jsonl`,
            `refusals.jsonl`, `reference/` (the model that knows all answers), `model/` (the same
            model after a few unlearning steps) and the run of the profile. `sweep/` gets the run of
            a sweep, by token; `steps/` the runs of unlearning with four objectives, and a page that
            compares them; `measures/` an evaluation of the four unlearned models beside the effects
            at the reference. If anything but a plot or page fails, `out` is left as it was.
        seed: seed of data, weights and order.
        overwrite: whether an earlier demo in `out` may be replaced.
        progress: whether to show bars and print what happens.
        size: size of the demo; None for one that two cores train in two minutes.

    Returns:
        The result of the profile, as `geffect_fast.profile` returns it. The result of the sweep is
        in its folder.

    Raises:
        InputError: `out` is in use, or holds files that would be replaced; or the disk refuses.
        GEffectError: the model did not learn its data, or did not begin to forget.
        UnfinishedError: all numbers are written, but a plot or page could not be made.
    """
    size = size or Size()
    unmade: list[UnfinishedError] = []
    with locked(out) as folder, folder_for(f"demo {out}", folder), noticed_once():
        check_free(out, overwrite)
        _check_parts(out, folder, overwrite)
        result = _run_demo(folder, own_files(folder), seed, progress, size, unmade)
    if unmade:
        raise unmade[0]
    return result


def _check_parts(out: str | Path, folder: Path, overwrite: bool) -> None:
    """Raise `InputError` where a file is in the way of a demo's data, models and runs."""
    own = own_files(folder)
    for part in PARTS:
        held = _part_files(folder, part)
        if theirs := [name for name in held if name not in own]:
            raise InputError(f"{out} holds {theirs[0]}, which no demo made; choose another --out")
        if is_there(folder / part) and not overwrite:
            raise InputError(f"{out} already holds {part}; choose another --out or use --overwrite")


def _part_files(folder: Path, part: str) -> list[str]:
    """The existing files of one of `PARTS`, by path in the demo's folder."""
    if (folder / part).is_dir():
        return [f"{part}/{name}" for name in files_below(folder / part)]
    return [part] if is_there(folder / part) else []


def _run_demo(
    folder: Path,
    own: Collection[str],
    seed: int,
    progress: bool,
    size: Size,
    unmade: list[UnfinishedError],
) -> xr.Dataset:
    """Run all of a demo, whose files replace those of an earlier one, `own`.

    Errors of plots and pages that could not be made are added to `unmade`.
    """
    outside = {name for name in own if Path(name).parts[0] not in PARTS}
    with set_aside(folder, {*outside, *PARTS, *PLAIN_FILES}):
        values = _prepare(folder, seed, progress, size)
        profiled = make_config(values | {"objectives": OBJECTIVES})
        result = _execute(profiled, folder, progress, unmade)
        swept = {"command": "sweep", "objectives": RANGES, "resolve": ("sample", "token")}
        _execute(make_config(values | swept), folder / SWEEP, progress, unmade)
        with torch.random.fork_rng(devices=[]):  # transformers' Trainer sets the global seed
            runs = _unlearn(folder, values, progress, size)
            _measure(folder, progress, unmade)
        try:
            write_page(runs, folder / STEPS / PAGE)
        except Exception as error:  # as in `write_report`: a failed page costs only the page
            unmade.append(
                UnfinishedError(
                    f"the demo in {folder} is whole, but {PAGE} could not be made "
                    f"({reason_of(error)}); geffect-fast report {folder / STEPS}/* --out FILE "
                    "writes one"
                )
            )
        add_to_manifest(folder, *(name for part in PARTS for name in _part_files(folder, part)))
        return result


def _execute(
    config: ProfileConfig, folder: Path, progress: bool, unmade: list[UnfinishedError]
) -> xr.Dataset:
    """Run a profile or sweep of a demo, and add the error of an unfinished report to `unmade`."""
    try:
        return execute(config, folder, progress=progress, report=write_report)
    except UnfinishedError as error:
        unmade.append(error)
        return open_run(folder, lazy=True)
    except InterruptedRunError:  # nothing of a demo is kept
        raise KeyboardInterrupt from None


def _unlearn(
    folder: Path, values: dict[str, Any], progress: bool, size: Size
) -> dict[str, xr.Dataset]:
    """Unlearn the reference with each of four objectives, and return the results by objective."""
    if progress:
        print(f"The model that knows them all unlearns with {', '.join(UNLEARNED.values())}.")
    runs = {}
    for name, objective in UNLEARNED.items():
        config = checked_config(
            UnlearnConfig,
            {
                **{field: values[field] for field in ("forget", "retain")},
                **{"model": values["reference"], "objective": objective, "steps": size.n_updates},
                **{"probe_every": 2, "probe_rows": 12, "learning_rate": UNLEARN_RATE},
            },
        )
        try:
            runs[objective] = execute_unlearn(config, folder / STEPS / name, progress=progress)
        except InterruptedRunError:  # no part of a demo is kept to go on with
            raise KeyboardInterrupt from None
        except UnfinishedError as error:
            raise InputError(error.problem, remedy="free some space") from error
    return runs


def _measure(folder: Path, progress: bool, unmade: list[UnfinishedError]) -> None:
    """Evaluate the four unlearned models and the reference, beside the effects at the reference.

    The error of an unfinished report is added to `unmade`.
    """
    config = checked_config(
        EvaluateConfig,
        {
            "against_effects": [str(folder / STEPS / name) for name in UNLEARNED],
            "forget": str(folder / "forget.jsonl"),
            "retain": str(folder / ASKED),
            "metrics": [name for name in METRICS if name != "rouge_l" or find_spec("rouge_score")],
            "max_new_tokens": 32,
        },
    )
    if progress:
        print("Measures tell what the four unlearned models still know.", flush=True)
    try:
        execute_evaluation(config, folder / MEASURES, progress=progress, report=write_report)
    except UnfinishedError as error:
        unmade.append(error)
    except InterruptedRunError:  # nothing of a demo is kept
        raise KeyboardInterrupt from None


def _prepare(folder: Path, seed: int, progress: bool, size: Size) -> dict[str, Any]:
    """Fill the folder with data and models, and return the config fields that name them."""
    rows = make_fictitious_authors(size.n_authors, seed)
    forget, retain = split_forget(rows, 0.2)
    write_jsonl(forget, folder / "forget.jsonl")
    write_jsonl(retain, folder / "retain.jsonl")
    write_jsonl(retain[::ASKED_EVERY], folder / ASKED)
    write_jsonl(({"refusal": refusal} for refusal in REFUSALS), folder / "refusals.jsonl")

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    say(f"{len(rows)} questions about {size.n_authors} invented authors, {len(forget)} to forget.")
    tokenizer = train_tokenizer([f"{r['question']} {r['answer']}" for r in rows], size.vocab_size)
    sets = [tokenize_rows(part, tokenizer, name="demo") for part in (forget, retain)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, size)
    n_parameters = sum(p.numel() for p in model.parameters())
    epochs = memorise(model, sets, size, seed, progress)
    knowledge = [recall(model, part) for part in sets]
    say(
        f"A Llama of {n_parameters / 1e6:.1f} million parameters knows them by heart after "
        f"{epochs} epochs: {_percent(knowledge)}."
    )
    save(model, tokenizer, folder / "reference")
    steps = start_unlearning(model, sets[0], progress)
    save(model, tokenizer, folder / "model")
    say(
        f"The profile is of that model after {steps} steps of gradient ascent on the forget set: "
        f"{_percent([recall(model, part) for part in sets])}. The model before them is the "
        "reference; at the reference itself npo would be ga on another scale, and kl would have no "
        "gradient."
    )
    return {
        "model": str(folder / "model"),
        "reference": str(folder / "reference"),
        "forget": str(folder / "forget.jsonl"),
        "retain": str(folder / "retain.jsonl"),
        "refusals": str(folder / "refusals.jsonl"),
    }


def _percent(knowledge: list[tuple[float, float]]) -> str:
    said = [
        f"{100 * share:.0f} % of the {name} answers word for word, mean token "
        f"probability {mean:.2f}"
        for name, (mean, share) in zip(("forget", "retain"), knowledge, strict=True)
    ]
    return "; ".join(said)

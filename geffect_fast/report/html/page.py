"""The HTML page of one run, or of several step results. It needs no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError
from geffect_fast.paths import user_path
from geffect_fast.report.format import coverage_line
from geffect_fast.report.html import compare, measures, profile, steps
from geffect_fast.report.html.blocks import Block, Facts, Items, Section, Text, notes_of
from geffect_fast.report.html.predictors import predictor_blocks
from geffect_fast.report.html.templates import render
from geffect_fast.report.summary.effects import has_steps, is_comparison, last_step
from geffect_fast.report.summary.measures import (
    is_control,
    is_evaluation,
    is_relearning,
    measure_notes,
    measured_metrics,
    place_axis,
)
from geffect_fast.report.summary.predictors import is_against_effects
from geffect_fast.report.summary.run_findings import comparison_finding
from geffect_fast.report.summary.survey import is_survey
from geffect_fast.report.summary.sweep import is_sweep
from geffect_fast.results.by_rows import sum_positions
from geffect_fast.results.form import check_whole
from geffect_fast.storage.disk import whole_file
from geffect_fast.storage.run_folder import CONFIG, REPORT
from geffect_fast.storage.run_yaml import read_values
from geffect_fast.visible import one_line

if TYPE_CHECKING:
    import xarray as xr

SIGNS = [
    "The G-effect e of an objective on a risk is the inner product of their gradients. A descent "
    "step of size lr on the objective changes that risk by −lr·e, up to terms of order lr².",
    "e_u is the effect on the forget risk. Wanted is below 0: the loss on what must go rises.",
    "e_r is the effect on the retain risk, and any other e_… that on the data set of its name. "
    "Wanted is 0 or above: the loss on the rest does not rise. Below 0 is harm.",
    "Shares of parts of the model, of instances and of tokens add up to the whole effect exactly. "
    "A share of the other sign works against the rest.",
    "A cosine is the effect without sizes, from −1 to 1: it compares between all objectives.",
]


def write_page(
    runs: xr.Dataset | Mapping[str, xr.Dataset],
    file: str | Path,
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a page that needs no network and no other file, and shows all without scripts.

    The page has these sections, less those that the results hold nothing for: `answer`,
    `verdicts`, `shares`, `effects`, `survey`, `curves`, `measures`, `layers`, `instances`,
    `tokens`, `cosines`, `conflicts`, `prediction`, `table`, `signs`, `made`.

    Args:
        runs: a result, in memory or lazy, of `geffect_fast.profile`, `sweep`, `unlearn`,
            `profile_checkpoints`, `evaluate`, `against_effects`, `control` or `relearn`; or such
            results by the names that the page gives them, several where all of them have steps.
        file: the file to write; an existing one is replaced.
        configs: the fields of `run.yaml` of some of the runs, by the run's name.

    Returns:
        The file.

    Raises:
        InputError: there is no run, one of several runs has no steps or holds measures, runs do
            not compare, a result was taken apart, or the disk refuses.

    Examples:
        >>> gf.write_page(result, "page.html")
        >>> gf.write_page({"ga": gf.open_run("run-ga"), "npo": gf.open_run("run-npo")}, "both.html")
    """
    return write_html(page_html(runs, configs=configs), file)


def write_html(text: str, file: str | Path) -> Path:
    """Write a page, whole or not at all, and return the file as `write_page` does."""
    with whole_file(f"report {file}", file, "--out") as part:
        part.write_text(text, encoding="utf-8")
    return user_path(file)


def write_run_page(dataset: xr.Dataset, summed: xr.Dataset, folder: Path) -> None:
    """Write `report.html` of a run into its folder, or into the hidden folder that becomes it.

    Args:
        dataset: the result.
        summed: the result without positions or tokens; for measures, the result itself.
        folder: an existing folder.
    """
    home = folder.parent if folder.name.startswith(".") else folder
    held = [place / CONFIG for place in (folder, home) if (place / CONFIG).is_file()]
    name = one_line(home.absolute().name)
    configs = {name: read_values(held[0])} if held else None
    if is_evaluation(dataset):
        text = page_html({name: dataset}, configs=configs)
    else:
        text = _html({name: dataset}, {name: last_step(summed)}, configs or {})
    (folder / REPORT).write_text(text, encoding="utf-8")


def page_html(
    runs: xr.Dataset | Mapping[str, xr.Dataset],
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The text of the page that `write_page` writes."""
    import xarray as xr

    runs = {"": runs} if isinstance(runs, xr.Dataset) else runs
    if not runs:
        raise InputError("report: there is no run; give one, or several with steps")
    for name, dataset in runs.items():
        what = f"report: run {name}" if name else "report: this"
        check_whole(dataset, what)
        if not is_evaluation(dataset) and is_comparison(dataset):
            raise InputError(
                f"{what} is what runs have in common; give the runs themselves, as "
                "{'ga': run, 'npo': other}"
            )
        if is_evaluation(dataset):
            if len(runs) > 1:
                raise InputError(
                    f"report: run {name} holds measures, of which a page shows one run; evaluate "
                    "several models in one run (--models A B), or report it alone"
                )
            return _of_measures(name, dataset, configs or {})
    models = {name: sum_positions(last_step(dataset)) for name, dataset in runs.items()}
    return _html(runs, models, configs or {})


def _html(
    runs: Mapping[str, xr.Dataset],
    models: Mapping[str, xr.Dataset],
    configs: Mapping[str, Mapping[str, Any]],
) -> str:
    """The page of results that hold effects.

    Args:
        runs: the results by name.
        models: each result at one model, the last step's where there are steps, without positions
            or tokens.
        configs: the fields of `run.yaml` of some of the runs, by the run's name.
    """
    if len(runs) > 1:
        title, blocks = _compared(len(runs)), compare.sections(runs, models)
    else:
        ((name, dataset),), (model,) = runs.items(), models.values()
        title = _titled(_what(dataset), name)
        blocks = (steps if has_steps(dataset) else profile).sections(dataset, model)
    blocks |= {"signs": [Items(SIGNS)], "made": _made(runs, configs)}
    swept = any(is_sweep(dataset) for dataset in runs.values())
    return _page(
        title,
        _about(runs),
        blocks,
        curves="Over hyper-parameters" if swept else "",
        measures="Measures beside the effects",
    )


def _of_measures(name: str, dataset: xr.Dataset, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of one run of `evaluate`, `control` or `relearn`."""
    blocks = measures.sections(dataset) | {"made": _made({name: dataset}, configs)}
    stepwise = "step" in dataset["value"].dims
    return _page(
        _titled(_what(dataset), name),
        _about_measures(dataset),
        blocks,
        curves="" if stepwise else "Measures with their bounds",
        signs="What the measures are",
        instances="Rows to be forgotten",
    )


def _page(title: str, about: str, blocks: Mapping[str, list[Block]], **headings: str) -> str:
    """The page of blocks by section. A heading that is given and not empty replaces the usual."""
    sections = [
        Section(id, headings.get(id) or heading, blocks[id])
        for id, heading in _HEADINGS.items()
        if blocks.get(id)
    ]
    return render(
        "page.html.jinja",
        title=title,
        about=about,
        sections=sections,
        foot="Made by geffect_fast. This page is complete: it loads nothing from elsewhere.",
    )


_HEADINGS = {
    "answer": "What was found",
    "signs": "How to read a sign",
    "verdicts": "Verdicts",
    "shares": "What is kept",
    "effects": "Effects before, beside what unlearning did",
    "survey": "The survey's assessment",
    "curves": "Over steps",
    "measures": "All measures",
    "layers": "Where in the model",
    "instances": "Instances",
    "tokens": "Tokens",
    "cosines": "Cosines",
    "conflicts": "Conflicts with the retain risk",
    "prediction": "Predicted against measured",
    "table": "All numbers",
    "made": "What was run",
}


def top_blocks(dataset: xr.Dataset) -> list[Block]:
    """The blocks that open a page: the kind of result, what was found, and the verdicts.

    Args:
        dataset: a result that `write_page` takes, or one of `geffect_fast.compare`.
    """
    if is_evaluation(dataset):
        about, found = _about_measures(dataset), measures.answer(dataset)
        if is_survey(dataset):
            tables = measures.survey(dataset)
        elif is_control(dataset):
            tables = measures.shares(dataset)
        elif is_against_effects(dataset):
            tables = predictor_blocks(dataset)
        else:
            tables = [*measures.tables(dataset), *notes_of(measure_notes(dataset))]
        return [Text(_what(dataset), "label"), Text(about, "note"), *found, *tables]
    if is_comparison(dataset):
        title = Text(_compared(dataset.sizes["run"]), "label")
        return [title, Text(comparison_finding(dataset), "lead"), *compare.verdicts(dataset)]
    head = [Text(_what(dataset), "label"), Text(_about({"": dataset}), "note")]
    if has_steps(dataset):
        return [*head, *steps.answer(dataset), *steps.verdicts(dataset)]
    summed = sum_positions(dataset)
    return [*head, *profile.answer(summed), *profile.verdicts(summed)]


def _titled(what: str, name: str) -> str:
    return f"{what}: {name}" if name else what


def _compared(n: int) -> str:
    return f"{n} unlearning runs compared"


def _what(dataset: xr.Dataset) -> str:
    if is_evaluation(dataset):
        what = "Unlearning with control" if is_control(dataset) else "Measures"
        what = "Relearning" if is_relearning(dataset) else what
        return "Measures beside effects" if is_against_effects(dataset) else what
    if not has_steps(dataset):
        return "Sweep" if is_sweep(dataset) else "Unlearning objectives"
    trained = dataset.attrs.get("trained_objective")
    return f"Unlearning by {trained}" if trained else "Checkpoints"


def _about(runs: Mapping[str, xr.Dataset]) -> str:
    first = next(iter(runs.values()))
    n = first.sizes["objective"]
    one = "one objective" if n == 1 else f"{n} objectives"
    words = [one if len(runs) == 1 else f"{len(runs)} runs"]
    words.append(
        f"measured on {first.attrs['n_forget']} forget and {first.attrs['n_retain']} retain rows"
    )
    if has_steps(first) and len(runs) == 1:
        steps = first["step"].values
        words.append(f"{len(steps)} probes from step {steps[0]} to {steps[-1]}")
    words.append(str(first.attrs.get("created", ""))[:10])
    return " · ".join(word for word in words if word)


def _about_measures(dataset: xr.Dataset) -> str:
    n = len(measured_metrics(dataset))
    words = ["one metric" if n == 1 else f"{n} metrics"]
    axis = place_axis(dataset)
    if axis is not None and dataset.sizes[axis] > 1:
        words[0] += f" of {dataset.sizes[axis]} {axis}s"
    rows = json.loads(dataset.attrs.get("n_rows", "{}"))
    words.append(", ".join(f"{count} {name}" for name, count in rows.items()) + " rows")
    words.append(str(dataset.attrs.get("created", ""))[:10])
    return " · ".join(word for word in words if word)


def _made(runs: Mapping[str, xr.Dataset], configs: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """Model, data, settings, coverage and versions of every run."""
    blocks: list[Block] = []
    for name, dataset in runs.items():
        if len(runs) > 1:
            blocks.append(Text(name, "label"))
        attrs, config = dataset.attrs, configs.get(name, {})
        said = {key: value for key, value in config.items() if value not in (None, "", [], (), {})}
        said |= {key: attrs[key] for key in _ATTRIBUTES if key in attrs and key not in said}
        if "covered_parameters" in attrs:
            said["coverage"] = coverage_line(attrs)
        said["versions"] = [*map(" ".join, json.loads(attrs.get("versions", "{}")).items())]
        pairs = ((key.replace("_", " "), _written(value)) for key, value in said.items())
        blocks.append(Facts([pair for pair in pairs if pair[1]]))
    return blocks


_ATTRIBUTES = (
    "command",
    "trained_objective",
    "checkpoints",
    "suite",
    "max_new_tokens",
    "risk",
    "reduction",
    "engine",
    "engine_reason",
    "layout",
    "dtype",
    "precision_error",
    "precision_samples",
    "precision_note",
    "token_budget",
    "exchanged",
    "n_forget",
    "n_retain",
    "created",
)
"""Attributes that say how a result was made. Those that the run's config holds are left out."""


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_written(own)}" for key, own in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value))
    return str(value)

"""An unlearning run from its config to its folder, begun or resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geffect_fast.errors import InputError
from geffect_fast.runs.config import dump_config, load_config
from geffect_fast.runs.disk import folder_for, is_there, whole_file
from geffect_fast.runs.execute import check_sources, has_text, on_threads, read_data, tokenizer_of
from geffect_fast.runs.models import load_model
from geffect_fast.runs.store import CONFIG
from geffect_fast.runs.unlearn_config import UnlearnConfig
from geffect_fast.unlearning.folder import check_start, clear, finish, kept
from geffect_fast.unlearning.run import SAME_NUMBERS, Unlearning

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.runs.store import Reporter
    from geffect_fast.unlearning.watch import Told

CHOSEN = ("token_budget", "threads", "device", "dtype", "batch_size", "probe_rows")
"""Fields that are decided when a run begins, where nobody says, and recorded in its `run.yaml`."""


def execute_unlearn(
    config: UnlearnConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    said: Callable[[str], None] = lambda line: None,
    told: Told | None = None,
) -> xr.Dataset:
    """Unlearn as a config says, and write the run folder as it goes.

    The config saved holds what was chosen on the way (token budget, threads, batch size ...), so
    that it replays, and resumes, to bitwise the same numbers on the same machine.

    Args:
        config: the run.
        out: run folder.
        resume: go on with the run in it.
        overwrite: whether a run in it may be replaced.
        progress: whether to show a bar.
        report: adds tables and plots to the folder.
        said: told what was decided, a sentence each.
        told: of every probe.

    Returns:
        The result, as `geffect_fast.unlearn` returns it.

    Raises:
        As `geffect_fast.unlearn`.
    """
    folder = check_start(out, resume, overwrite)
    if resume:
        config = _as_begun(config, folder)
    device = check_sources(config)
    data = read_data(config, [config.objective, *config.objectives])
    tokenizer = tokenizer_of(config, has_text(data))
    with on_threads(config.threads) as n_threads:
        model = load_model(config.model, config.dtype, str(device))
        run = Unlearning(
            model,
            tokenizer,
            config.training(),
            objective=config.objective,
            objectives=config.objectives,
            sources=data,
            reference_model=config.reference,
            measuring={
                "resolve": config.resolve,
                "engine": config.engine,
                "reduction": config.reduction,
                "risk": config.risk,
                "norms": config.norms,
                "groups": config.groups or None,
                "token_budget": config.token_budget,
            },
            reading={"template": config.template, "max_length": config.max_length},
        )
        said(run.rows.sentence(run.sets))
        if not resume:
            chosen: dict[str, Any] = {
                "token_budget": run.profiler.token_budget,
                "threads": n_threads,
                "device": str(device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "batch_size": run.training.batch_size,
                "probe_rows": config.probe_rows or max(map(len, run.rows.rows.values())),
            }
            _begin(folder, config.model_copy(update=chosen))
        with kept(folder):
            dataset = run.train(folder, progress=progress, told=told)
            finish(folder, dataset, run, report)
    return dataset


def _begin(folder: Path, config: UnlearnConfig) -> None:
    """Make the folder, without an earlier run, with the config of this one."""
    with folder_for(f"run folder {folder}", folder):
        clear(folder)
        with whole_file(f"config {folder / CONFIG}", folder / CONFIG, "--out") as part:
            part.write_text(dump_config(config), encoding="utf-8")


def _as_begun(config: UnlearnConfig, folder: Path) -> UnlearnConfig:
    """The config with what was chosen when the run in the folder began.

    Raises:
        InputError: they differ in a field that decides numbers.
    """
    if not is_there(folder / CONFIG):
        raise InputError(f"run folder {folder} holds no {CONFIG} to resume; leave out --resume")
    begun = load_config(folder / CONFIG)
    if not isinstance(begun, UnlearnConfig):
        raise InputError(
            f"run folder {folder} holds a run of {begun.command}, which cannot be resumed; choose "
            "another --out"
        )
    taken: dict[str, Any] = {}
    for name, field in UnlearnConfig.model_fields.items():
        here, there = getattr(config, name), getattr(begun, name)
        if name in CHOSEN and here == field.default:
            taken[name] = there
        elif here != there and name not in SAME_NUMBERS:
            raise InputError(
                f"resume: {name} is {here}, and the run in {folder} was begun with {there}; give "
                "that, or begin another run in another --out"
            )
    return config.model_copy(update=taken)

"""`profile_checkpoints`: profiles of a training's saved checkpoints, along an axis `step`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model
from geffect_fast.measure.profiler import Profiler
from geffect_fast.measure.sources import resolved_list
from geffect_fast.objectives import Objective
from geffect_fast.optimizers.state import OPTIMIZER
from geffect_fast.paths import find_checkpoints, user_path
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.steps.checkpoints import loaded_in_turn
from geffect_fast.steps.probe import Probe, run_identity
from geffect_fast.storage.inputs import input_sums
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.storage.run_folder import STEPS
from geffect_fast.storage.step_folder import (
    check_resumed,
    check_start,
    finish,
    new_run,
    telling_what_is_kept,
    working_folder,
)
from geffect_fast.storage.step_store import StepStore
from geffect_fast.terminal import progress_bar

if TYPE_CHECKING:
    import xarray as xr
    from transformers import PreTrainedModel

    from geffect_fast.settings import ProfileConfig
    from geffect_fast.storage.manifest import Sums
    from geffect_fast.storage.run_folder import Reporter


@on_all_ranks
def profile_checkpoints(
    checkpoints: str | Path | Sequence[str | Path],
    tokenizer: Any,
    *,
    forget: Any,
    retain: Any,
    objectives: Sequence[str | Objective] | str,
    model: str | Path | None = None,
    reference_model: nn.Module | str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    weights: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> xr.Dataset:
    """Profile one checkpoint after the other: the G-effect along a training that was done before.

    The weights of each checkpoint are copied into one model; while one is profiled, the next is
    read from disk. The ranks of a process group share the rows of each checkpoint, and the first
    rank writes `out`, which all ranks must see.

    Args:
        checkpoints: patterns such as `out/checkpoint-*`, or folders, of models or of adapters. The
            step is the number that ends a folder's name, or the `global_step` of its
            `trainer_state.json`.
        tokenizer: a tokenizer of transformers; None for samples that are tokenised already.
        forget, retain, objectives: as in `geffect_fast.profile`.
        model: folder of the model before training, measured as step 0; None to leave it out.
        reference_model: the reference of NPO-like objectives; None for the first of the models.
        dtype, device: as in `geffect_fast.measure.models.load_model`.
        weights: whether `token_weight`, the weights that objectives give to tokens, is measured
            too.
        out: run folder, for one file a step and in the end `results.nc`; None keeps results in
            memory.
        resume: whether to resume the run in `out`.
        overwrite: whether an earlier run in `out` may be replaced.
        progress: whether to show a bar.
        options: further arguments of `geffect_fast.profile`, `second_order` among them.

    Returns:
        The results of `geffect_fast.profile` along a first axis `step`, with `measured_change` and
        `predicted_update` of the risks between checkpoints (docs/concepts.md).

    Raises:
        InputError: an argument is unusable, there is no checkpoint, one has another architecture,
            or two have the same step.
        UnfinishedError: the disk refuses; earlier steps are kept.
        InterruptedRunError: Ctrl-C with `out`; the steps are kept.

    Examples:
        >>> result = gf.profile_checkpoints("out/checkpoint-*", tokenizer, forget="forget.jsonl",
        ...                                 retain="retain.jsonl", objectives=["ga", "npo"])
        >>> result.g_effect.sum(["parameter", "sample"]).sel(risk="unlearn")
    """

    def prepared() -> CheckpointRun:
        return CheckpointRun(
            checkpoints,
            tokenizer,
            model=model,
            reference_model=reference_model,
            load=partial(
                load_model,
                dtype=dtype,
                device=device,
                what="checkpoint",
                trust_remote_code=options.get("trust_remote_code", False),
            ),
            options=options | {"forget": forget, "retain": retain, "objectives": objectives},
        )

    ranks, how = here(), {"weights": weights, "progress": progress}
    ranks.check_same({"out": out and str(out), "resume": resume, "weights": weights})
    if out is None:
        return prepared().measure(None, **how)
    read = _paths(checkpoints, model, reference_model, forget, retain, options)
    with working_folder(
        out, ranks, partial(check_start, out, resume, overwrite, inputs=read)
    ) as folder:
        run = prepared()
        sums = input_sums(read) if ranks.first else {}
        if resume and ranks.first:
            check_resumed(folder, sums)
        return run.written(folder, None, sums, None, resume=resume, **how)


def _paths(
    checkpoints: str | Path | Sequence[str | Path],
    model: str | Path | None,
    reference_model: Any,
    forget: Any,
    retain: Any,
    options: Mapping[str, Any],
) -> dict[str, str | Path]:
    """The inputs that are given as a path or hub id, by argument."""
    given = {"model": model, "reference_model": reference_model, "forget": forget, "retain": retain}
    given |= {"refusals": options.get("refusals"), **(options.get("probes") or {})}
    folders = find_checkpoints(checkpoints).values()
    return {
        **{f"checkpoint {path.name}": path for path in folders},
        **{name: source for name, source in given.items() if isinstance(source, str | Path)},
    }


class CheckpointRun:
    """A prepared profile of checkpoints: their folders, the model and its profiler.

    Making an instance writes nothing.

    Args:
        checkpoints, tokenizer, model, reference_model: as in `profile_checkpoints`.
        load: loads the model in the first checkpoint's folder, into which the weights of the others
            are copied; ranks may share the model.
        options: further arguments of `geffect_fast.profile`.

    Attributes:
        folders: folders of the checkpoints, by step.
        model: the model of the first checkpoint, whose weights will change.
        optimizers: whether any checkpoint holds its optimizer's state.
        second_order: whether the curvature along these optimizers' steps is measured.
        profiler: the model's profiler.

    Raises:
        InputError: as in `profile_checkpoints`.
    """

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path],
        tokenizer: Any,
        *,
        model: str | Path | None,
        reference_model: nn.Module | str | Path | None,
        load: Callable[[Path], PreTrainedModel],
        options: dict[str, Any],
    ) -> None:
        self.folders = with_model(find_checkpoints(checkpoints), model)
        self.second_order = options.pop("second_order", False)
        self.optimizers = any((each / OPTIMIZER).exists() for each in self.folders.values())
        if self.second_order and not self.optimizers:
            raise InputError(
                f"second_order: no checkpoint holds {OPTIMIZER}, whose step it is of; leave it out"
            )
        trusted = options.get("trust_remote_code", False)
        for folder in self.folders.values():
            check_model_source(folder, "checkpoint", trusted)
        options = options | {"objectives": resolved_list(options["objectives"])}
        first = next(iter(self.folders.values()))
        self.model = load(first)
        # The reference is loaded from the folder, since the model's own weights will change.
        reference = first if reference_model is None else reference_model
        self.profiler = Profiler.of(self.model, tokenizer, reference_model=reference, **options)
        self._names = json.dumps({step: str(path) for step, path in self.folders.items()})
        self.profiler.ranks.check_same({"checkpoints": self._names})

    def written(
        self,
        folder: Path,
        config: ProfileConfig | None,
        sums: Mapping[str, Sums],
        report: Reporter | None,
        *,
        resume: bool,
        **how: bool,
    ) -> xr.Dataset:
        """Measure the steps that are not measured yet, and complete the run in a folder.

        Args:
            folder: the run's folder.
            config, sums: config and checksums of inputs for `new_run`, unless the run is resumed.
            report: adds tables and plots to the folder.
            resume: whether the run is resumed.
            how: arguments of `measure`.

        Returns:
            The result of all steps.

        Raises:
            As in `profile_checkpoints`.
        """
        if not self.profiler.ranks.first:
            return self.measure(folder, **how)
        with (
            nullcontext() if resume else new_run(folder, config, sums),
            telling_what_is_kept(folder),
        ):
            dataset = self.measure(folder, **how)
            finish(folder, dataset, report)
        return dataset

    def measure(
        self, folder: Path | None, *, weights: bool = True, progress: bool = False
    ) -> xr.Dataset:
        """Measure the steps that are not measured yet.

        Args:
            folder: the run's folder, with its steps; None keeps them in memory.
            weights: as in `profile_checkpoints`.
            progress: whether to show a bar.

        Returns:
            The result of all steps.
        """
        identity = run_identity(self.profiler, checkpoints=self._names, weights=weights)
        ranks = self.profiler.ranks
        store = StepStore(None if folder is None else folder / STEPS, identity, ranks)
        steps, done = list(self.folders), store.steps
        store.check_free(step for step in steps if step not in done)
        # A step that is done is loaded again where the next is not done and is compared with it.
        wanted = [
            step
            for step, following in zip(steps, [*steps[1:], steps[-1]], strict=True)
            if step not in done or following not in done
        ]
        probe = Probe(self.profiler, store, weights=weights, second_order=self.second_order)
        first = self.folders[steps[0]]
        with progress_bar(progress and ranks.first, "checkpoints", len(wanted)) as update:
            for step in loaded_in_turn(self.model, first, self.folders, wanted):
                probe.measure_at(step, optimizer=self.folders[step] if self.optimizers else None)
                update(advance=1)
        of_last = store.read(store.steps[-1]).attrs  # the first may lack an optimizer's state
        said = {key: of for key, of in of_last.items() if key.startswith("step_metric")}
        dataset = store.combined()
        ranks.meet()  # from now on the first rank may move the files
        kept = {key: of for key, of in dataset.attrs.items() if not key.startswith("step_metric")}
        return dataset.drop_attrs(deep=False).assign_attrs(
            **kept,
            **said,
            command="profile",
            checkpoints=json.dumps([str(path) for path in self.folders.values()]),
        )


def with_model(folders: dict[int, Path], model: str | Path | None) -> dict[int, Path]:
    """The checkpoints' folders by step, with the model before training added as step 0.

    A model that is among the checkpoints is not added.

    Raises:
        InputError: there is another checkpoint of step 0, or the model is no folder.
    """
    if model is None:
        return folders
    folder = user_path(model).absolute()
    if folder in folders.values():
        return folders
    if not folder.is_dir():
        raise InputError(f"model {model}: give a folder, as checkpoints are, or leave it out")
    if 0 in folders:
        raise InputError(
            f"checkpoints: {folders[0]} is of step 0, and so is the model {model}; leave one out"
        )
    return {0: folder} | folders

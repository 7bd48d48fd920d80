"""`unlearn`: training on an unlearning objective, with the G-effect measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.arguments import checked_config, with_settings
from geffect_fast.capture.compat import is_sharded
from geffect_fast.capture.shards import at_work
from geffect_fast.measure.sources import Sources
from geffect_fast.objectives import Objective
from geffect_fast.ranks import here, on_all_ranks
from geffect_fast.settings import LiveMetrics, Measuring
from geffect_fast.storage.inputs import input_sums, weights_sums
from geffect_fast.storage.step_folder import check_resumed, working_folder
from geffect_fast.training.folder import carried_out, check_start
from geffect_fast.training.run import Unlearning
from geffect_fast.unlearn_settings import Training, UnlearnSettings

if TYPE_CHECKING:
    import xarray as xr

    from geffect_fast.storage.run_folder import Reporter


@with_settings(UnlearnSettings)
@on_all_ranks
def unlearn(
    model: nn.Module,
    tokenizer: Any,
    *,
    forget: Any,
    retain: Any,
    objective: str | Objective,
    objectives: Sequence[str | Objective] = (),
    probes: Mapping[str, Any] | None = None,
    refusals: Any = None,
    reference_model: nn.Module | str | Path | None = None,
    holdout: Any = None,
    retain_model: nn.Module | str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    report: Reporter | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Train a model on an unlearning objective, and measure the G-effect at steps on the way.

    The training is transformers' `Trainer`. Every update reads `batch_size` forget rows, and as
    many retain rows where the objective reads them; the gradient is that of the objective on these
    rows together, whatever they are cut into. Probes change nothing about the training.

    Args:
        model: a causal language model of transformers, trained in place (with `lora_rank` an
            adapter is put into it); in eval mode afterwards.
        tokenizer, forget, retain, probes, refusals: as `geffect_fast.profile` takes them.
        objective: the objective to train on, such as `npo(beta=0.1) + 1.0*kl`.
        objectives: further objectives, whose effects are measured as well.
        reference_model: the model that NPO-like objectives compare with; None: the model as it was
            before training.
        holdout, retain_model: further rows and a further model that metrics read, as
            `geffect_fast.evaluate` takes them; the metric `reference` compares with
            `reference_model`.
        out: a folder for `steps/` (a file a probe), checkpoints to resume from, and in the end
            `model/` and `results.nc`; None: nothing is written.
        resume: resume the run in `out`.
        overwrite: whether an earlier run in `out` may be replaced.
        progress: show a bar.
        report: writes tables and plots into `out` beside the result.
        settings:

    Returns:
        The results of `geffect_fast.profile` along a first axis `step`, and beside them for each
        step `learning_rate`, `measured_change`, `predicted_update`, `predicted_sgd` and
        `token_weight` (docs/concepts.md).

    Raises:
        InputError, UnsupportedModelError: unusable data, objective or argument; nothing is written.
        NonFiniteError: the loss, or a gradient at a probe, is not finite; the step is named.
        UnfinishedError: the disk refuses; the steps before it are kept.
        InterruptedRunError: Ctrl-C with `out`; the steps are kept.

    Examples:
        >>> result = gf.unlearn(model, tokenizer, forget="forget.jsonl", retain="retain.jsonl",
        ...                     objective="npo(beta=0.1)", steps=60, learning_rate=1e-5)
        >>> result.g_effect.sum(["parameter", "sample"]).sel(objective="npo(beta=0.1)")
    """
    checked = checked_config(UnlearnSettings, settings)

    def prepared() -> Unlearning:
        return Unlearning(
            model,
            tokenizer,
            Training(**checked.fields(Training)),
            objectives=[objective, *objectives],
            sources=Sources.of(forget, retain, probes, refusals),
            settings=Measuring(**checked.fields(Measuring)),
            reference_model=reference_model,
            live=LiveMetrics(**checked.fields(LiveMetrics)),
            holdout=holdout,
            retain_model=retain_model,
        )

    ranks = here()
    ranks.check_same({"out": out and str(out), "resume": resume})
    if out is None:
        return prepared().train(None, progress=progress)
    given = {"forget": forget, "retain": retain, "refusals": refusals, **(probes or {})}
    given |= {"reference_model": reference_model, "holdout": holdout, "retain_model": retain_model}
    read = {name: source for name, source in given.items() if isinstance(source, str | Path)}
    with working_folder(out, ranks, partial(check_start, out, resume, overwrite, read)) as folder:
        models = {"model": model, "reference_model": reference_model, "retain_model": retain_model}
        weights = {}
        for name, each in models.items():
            if isinstance(each, nn.Module) and (ranks.first or is_sharded(each)):
                with ranks.in_step(ranks.size > 1 and is_sharded(each)), at_work(each):
                    weights[name] = weights_sums(each)
        run = prepared()  # after the sums, since it may put an adapter into the model
        sums = input_sums(read) | weights if ranks.first else {}
        if resume and ranks.first:
            check_resumed(folder, sums)
        return carried_out(run, folder, None, sums, report, resume=resume, progress=progress)

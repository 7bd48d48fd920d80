"""`evaluate`: the field's metrics of an unlearned model, with names on every axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from geffect_fast.arguments import checked_config, with_settings
from geffect_fast.evaluation_settings import MetricsAndTasks
from geffect_fast.measure.evaluator import Evaluator, Model, checked_probes
from geffect_fast.measure.harness import Harness
from geffect_fast.metrics.base import FORGET, HOLDOUT, RETAIN
from geffect_fast.ranks import here, on_all_ranks

if TYPE_CHECKING:
    import xarray as xr


@with_settings(MetricsAndTasks)
@on_all_ranks
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    forget: Any,
    retain: Any,
    holdout: Any = None,
    probes: Mapping[str, Any] | None = None,
    reference_model: Model | None = None,
    retain_model: Model | None = None,
    progress: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """Measures of a model on data sets, by metric, set and sample, with intervals.

    Every metric of logits is read from one teacher-forced pass over the rows of all sets, packed
    into batches. Texts are generated, and gradients formed, where a metric asks for them. The ranks
    of a process group share out the rows; each returns the whole result.

    Args:
        model: a causal language model of transformers; it is measured in eval mode and left as it
            was.
        tokenizer: of transformers; None for samples that are tokenised already.
        forget: what must go: a path to JSON or JSON lines of `question` and `answer`, a hub id, a
            list of dicts, or tokenised samples; rows of multiple choice, conversations, plain text
            and continuations too (`docs/data.md`). Some metrics read further fields, as in TOFU:
            `paraphrased_answer`, `perturbed_answer` (a list), `paraphrased_question`.
        retain: what must stay, likewise.
        holdout: rows like the forget set's that no model was trained on, for membership.
        probes: further data sets by name; `model_utility` reads `real_authors` and `world_facts`.
            Sets named `forget_icl`, `retain_icl` ... hold answered questions that
            `knowledge_memorisation` puts before each question of that set, as MUSE does.
        reference_model: what the metric `reference` compares with, a model or the folder of one.
        retain_model: a model trained without the forget rows, for `forget_quality` and `privleak`:
            a model, the folder of one, or for `forget_quality` the JSON of TOFU's evaluation log.
        progress: show a bar.
        settings:

    Returns:
        A Dataset with `value` (metric, set), `value_low` and `value_high`, the bounds that hold
        `interval_level` of all draws of the rows (`geffect_fast.results.intervals`), and
        `sample_value` (metric, sample), the rows' scores. All are fp64, and NaN where a metric has
        no number. Bounds are also NaN for a p-value, and where all rows of a set score alike, which
        says nothing about other rows. A number of several sets together stands under the set `all`.
        The scores of `lm_eval_tasks` stand under the set `lm_eval`, as `TASK/SCORE`, with bounds of
        1.96 standard errors either way and no scores of rows.

        Coordinates: `metric` as written, with `statistic` (what the number of a set is: mean, AUC,
        p-value ...); `set`; `sample` (row number) with `sample_set` and `question`.

        `xarray.concat(results, "model")` puts the results of several models side by side.

    Raises:
        InputError: unusable data, model or metric, in one line.
        NonFiniteError: a weight or log-probability is not finite; the first is named.
        UnsupportedModelError: the model cannot do what a metric needs.

    Examples:
        >>> result = gf.evaluate(model, tokenizer, forget="forget01_perturbed.json",
        ...                      retain="retain_perturbed.json", metrics=["truth_ratio", "rouge_l"])
        >>> result.value.sel(metric="rouge_l", set="forget")
    """
    checked, progress = checked_config(MetricsAndTasks, settings), progress and here().first
    sources = {FORGET: forget, RETAIN: retain, HOLDOUT: holdout, **checked_probes(probes)}
    harness = Harness(checked, tokenizer, sources) if checked.lm_eval_tasks else None
    evaluator = Evaluator(model, tokenizer, checked, sources, reference_model, retain_model)
    measures = evaluator.measure(model, progress=progress)
    return measures if harness is None else harness.beside(measures, model, progress=progress)

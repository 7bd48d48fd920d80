"""`evaluate --suite survey` from its config to its folder: measures, and the rest of the survey."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.measure.execute_evaluation import execute_evaluation, models_of
from geffect_fast.measure.prepare import Sources, read_sources, resolved_list
from geffect_fast.storage.inputs import Inputs
from geffect_fast.storage.model_folder import check_model_source
from geffect_fast.training.survey import Survey

if TYPE_CHECKING:
    import xarray as xr


def execute_survey(
    config: EvaluateConfig,
    out: str | Path,
    *,
    progress: bool = False,
    inputs: Inputs = MappingProxyType({}),
    **more: Any,
) -> xr.Dataset:
    """As `execute_evaluation`, with what the survey asks for beside measures (`Survey.added`)."""
    _, models, _ = models_of(config)
    survey = Survey(config, models, progress)
    if survey.original is not None:
        check_model_source(survey.original, "original", config.trust_remote_code)
        named = Sources.of(config.forget, config.retain, None, survey.refusals)
        # what objectives lack is told before models are loaded
        read_sources(named, resolved_list(survey.objectives or ("ga",)), config.data_format)
    found = {"original": survey.original, "refusals": survey.refusals}
    return execute_evaluation(
        config.model_copy(update=found),
        out,
        progress=progress,
        inputs=inputs,
        assess=survey.added,
        **more,
    )

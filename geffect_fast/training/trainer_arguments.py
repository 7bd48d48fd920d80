"""transformers' TrainingArguments from the config of an unlearning run, with checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from geffect_fast.errors import InputError, in_one_line
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.registry import nearest
from geffect_fast.training.logs import check_reporters
from geffect_fast.training.single_process import current
from geffect_fast.unlearn_settings import Training

OF_CONFIG = {
    "output_dir": "--out",
    "max_steps": "--steps",
    "num_train_epochs": "--steps",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulation",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--scheduler",
    "warmup_steps": "--warmup-steps",
    "optim": "--optimizer",
    "bf16": "--precision bf16",
    "fp16": "--precision fp16",
    "activation_checkpointing": "--checkpointing",
    "gradient_checkpointing": "--checkpointing",
    "seed": "--seed",
    "data_seed": "--seed",
    "use_cpu": "--device",
    "save_steps": "--save-every",
    "save_strategy": "--save-every",
    "save_total_limit": "--keep-checkpoints",
    "resume_from_checkpoint": "--resume",
    "report_to": "--report-to",
}
"""Fields of TrainingArguments that an option decides, with this option."""

_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
_Fields = dict[str, Any] | None
SERVED: dict[str, Any] = {
    "weight_decay": _Rate,
    "adam_beta1": _Beta,
    "adam_beta2": _Beta,
    "adam_epsilon": _Rate,
    "max_grad_norm": _Rate,
    "optim_args": str | None,
    "optim_target_modules": str | list[str] | None,
    "lr_scheduler_kwargs": _Fields,
    "activation_checkpointing_kwargs": _Fields,
    "gradient_checkpointing_kwargs": _Fields,
    "full_determinism": bool,
    "tf32": bool | None,
    "torch_empty_cache_steps": PositiveInt | None,
    "disable_tqdm": bool,
    "log_level": str,
    "logging_strategy": str,
    "logging_steps": PositiveFloat,
    "logging_first_step": bool,
    "run_name": str | None,
}
"""Fields of TrainingArguments that may be given, with the types of their values. Other fields would
change the training (noise, samplers, other kernels) or what is saved, or would do nothing here
(evaluation, workers)."""


def training_arguments(
    config: Training, folder: str | Path, device: torch.device, *, reports: bool = True
) -> TrainingArguments:
    """The arguments of transformers' Trainer for a run; to be called inside `single_process`.

    The data set of the Trainer holds one item an update (`geffect_fast.training.trainer`), so the
    arguments leave out batch size and accumulation.

    Args:
        config: config of the run.
        folder: folder where checkpoints go.
        device: device of the model.
        reports: whether this process tells the reporters of `report_to`; one of several ranks does.

    Raises:
        InputError: an unknown optimizer, scheduler, reporter or field, or a value that is refused.
    """
    check_reporters(config.report_to)
    _known("optimizer", config.optimizer, [o.value for o in OptimizerNames])
    _known("scheduler", config.scheduler, [s.value for s in SchedulerType])
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    given: dict[str, Any] = {}
    for name, value in config.trainer.items():
        _known("trainer", name, names, list(SERVED))
        if name in OF_CONFIG:
            raise InputError(f"trainer: {name} is decided by {OF_CONFIG[name]}; use that")
        if name not in SERVED:
            raise InputError(f"trainer: {name} is not served here; leave it out")
        try:
            given[name] = TypeAdapter(SERVED[name]).validate_python(value)
        except ValidationError as error:
            why = error.errors()[0]["msg"].removeprefix("Input ")
            raise InputError(f"trainer: {name} {why}, got {value!r}; correct it") from None
    # A later version of transformers 5 renamed gradient checkpointing.
    renamed = "activation_checkpointing" in names
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    values: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **given,
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": 1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup_steps,
        "optim": config.optimizer,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        checkpointing: config.checkpointing,
        "save_strategy": "no",
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "report_to": list(config.report_to) if reports else [],
    }
    try:
        # Without these, accelerate warns of a process group that it does not know, and the first
        # GPU stays the current one.
        with quiet_transformers(), current(device):
            arguments = TrainingArguments(**values)
    except Exception as error:  # of many kinds, from transformers, accelerate and torch
        raise InputError(
            f"trainer: {in_one_line(error, 300)}; correct it or leave it out"
        ) from None
    vars(arguments)["_setup_devices"] = device  # for transformers it is always the first GPU
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device, never nn.DataParallel
    return arguments


def check_precision(config: Training, model: nn.Module) -> None:
    """Raise `InputError` where a model cannot be trained under the autocast of the config.

    On a CPU accelerate would leave out autocast to fp16 without a word.
    """
    if config.precision != "fp16":
        return
    if next(model.parameters()).device.type == "cpu":
        raise InputError("precision: fp16 needs a GPU; use bf16 on a CPU, or leave it out")
    low = any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad)
    if low and config.lora_rank is None:
        raise InputError(
            "precision: fp16 scales gradients up, which float16 weights leave no room for; use "
            "--dtype float32, or leave --precision out"
        )


def refused(config: Training, error: Exception) -> InputError:
    """The error for an optimizer, a scheduler or a reporter that cannot be made as asked."""
    return InputError(
        f"optimizer {config.optimizer}, scheduler {config.scheduler}, or trainer: "
        f"{in_one_line(error, 300)}; correct it or choose another"
    )


def _known(what: str, value: str, names: list[str], advised: list[str] | None = None) -> None:
    if value in names:
        return
    names = advised or names
    advice = nearest(value, names, f"choose from {', '.join(names[:12])} ...")
    raise InputError(f"{what}: unknown '{value}'; {advice}")

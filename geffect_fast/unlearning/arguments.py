"""From an unlearning run's config to transformers' TrainingArguments, checked."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from geffect_fast.errors import InputError
from geffect_fast.runs.unlearn_config import Training

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
}
"""Fields of TrainingArguments that a field of ours decides, and its option."""

NOT_SERVED = (
    "auto_find_batch_size",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "label_smoothing_factor",
    "load_best_model_at_end",
    "parallelism_config",
    "push_to_hub",
    "save_only_model",
    "ignore_data_skip",
    "torch_compile",
)
"""Fields that would change what is trained, or what is saved to resume from."""


def training_arguments(config: Training, folder: str | Path, device: str) -> TrainingArguments:
    """The arguments of transformers' Trainer for a run.

    The data set of the Trainer holds one item an update (`geffect_fast.runs.training`), so batch
    size and accumulation are not among them.

    Args:
        config: of the run.
        folder: where checkpoints go.
        device: of the model.

    Raises:
        InputError: an unknown optimizer, scheduler or field, or a value that is refused.
    """
    _known("optimizer", config.optimizer, [o.value for o in OptimizerNames])
    _known("scheduler", config.scheduler, [s.value for s in SchedulerType])
    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for name in config.trainer:
        _known("trainer", name, names)
        if name in OF_CONFIG:
            raise InputError(f"trainer: {name} is decided by {OF_CONFIG[name]}; use that")
        if name in NOT_SERVED:
            raise InputError(f"trainer: {name} is not served here; leave it out")
    # transformers 5 renamed gradient checkpointing on its way
    renamed = "activation_checkpointing" in names
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    values: dict[str, Any] = {
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "report_to": [],
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **config.trainer,
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
        "use_cpu": device == "cpu",
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }
    try:
        arguments = TrainingArguments(**values)
    except Exception as error:  # of many kinds, from transformers, accelerate and torch
        raise InputError(f"trainer: {_flat(error)[:300]}; correct it or leave it out") from None
    if arguments.world_size > 1:
        raise InputError(
            f"{arguments.world_size} processes: unlearning runs in one; start it without torchrun"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device, never nn.DataParallel
    return arguments


def _known(what: str, value: str, names: list[str]) -> None:
    if value in names:
        return
    close = difflib.get_close_matches(value, names, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names[:12])} ..."
    raise InputError(f"{what}: unknown '{value}'; {advice}")


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())

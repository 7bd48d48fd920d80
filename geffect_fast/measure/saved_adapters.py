"""Saving of adapters as they were measured, one or the sum of two, and the check of the files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geffect_fast.capture.modes import modes_kept
from geffect_fast.errors import InputError


@torch.no_grad()
def save_sum(model: Any, folder: Path) -> None:
    """Write the active adapters as one, whose rank is the sum of theirs and whose scale is 1:

        A = [s1 A1; s2 A2]    B = [B1 B2]    B A = s1 B1 A1 + s2 B2 A2

    `A` and `B` are filled up with zeros to one rank for all modules. So one config holds for every
    module, whatever patterns of modules, layers and scales the two adapters have.
    """
    import peft

    active = list(model.active_adapters)
    name = f"{active[0]}_mixed"
    adapted = _adapted(model)
    factors = {
        place: [_factors(layer, each) for each in active if each in layer.scaling]
        for place, layer in adapted.items()
    }
    rank = max(sum(len(a) for a, _ in of) for of in factors.values())
    config = model.peft_config[active[0]]
    model.add_adapter(
        name,
        peft.LoraConfig(
            task_type=config.task_type,
            base_model_name_or_path=config.base_model_name_or_path,
            target_modules=list(factors),
            r=rank,
            lora_alpha=rank,
            fan_in_fan_out=config.fan_in_fan_out,
        ),
    )
    try:
        for place, of in factors.items():
            at, (down, up) = 0, _pair(adapted[place], name)
            down.zero_(), up.zero_()
            for a, b in of:
                down[at : at + len(a)], up[:, at : at + len(a)] = a, b
                at += len(a)
        save_adapter(model, folder, name)
    finally:
        model.delete_adapter(name)
        model.base_model.set_adapter(active)


def save_adapter(model: Any, folder: Path, name: str) -> None:
    """Write an adapter directly into a folder.

    peft writes an adapter that is not called `default` into a folder below; its files are moved up.
    """
    model.save_pretrained(str(folder), selected_adapters=[name])
    if name != "default":
        for file in (folder / name).iterdir():
            shutil.move(file, folder / file.name)
        (folder / name).rmdir()


def _adapted(model: Any) -> dict[str, Any]:
    """The layers of the base model that an adapter adds to, by name."""
    from peft.tuners.lora import LoraLayer

    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def _pair(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A layer's `A` and `B` of an adapter."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A layer's `s A` and `B` of an adapter, fp64, on the CPU, where parts are brought together."""
    a, b = (each.cpu() for each in _pair(layer, adapter))
    return a.double() * layer.scaling[adapter], b.double()


@torch.no_grad()
def check_saved(model: Any, folder: Path) -> None:
    """Raise `InputError` where the adapter in a folder adds something else than the active ones.

    The adapter is read by peft as any user reads it. Outputs are compared layer by layer, on random
    vectors, up to the rounding of the adapter's weights.
    """
    active = list(model.active_adapters)
    name = f"{active[0]}_saved"
    with modes_kept(model):
        model.load_adapter(str(folder), name, torch_device=str(next(model.parameters()).device))
        try:
            for place, layer in _adapted(model).items():
                of = {each: _factors(layer, each) for each in layer.scaling}
                known = _pair(layer, next(iter(of)))[0]
                x = torch.randn(known.shape[1], 4, generator=torch.Generator().manual_seed(0))
                x = x.double()
                meant, most, found = torch.zeros(3, 1, 1, dtype=x.dtype)
                for a, b in (of[each] for each in active if each in of):
                    meant = meant + b @ (a @ x)
                    most = most + b.abs() @ (a.abs() @ x.abs())
                if name in of:
                    found = of[name][1] @ (of[name][0] @ x)
                if not bool(((found - meant).abs() <= torch.finfo(known.dtype).eps * most).all()):
                    raise InputError(
                        f"save: the adapter that was written adds something else to {place} than "
                        "what was measured; merge the adapters into their base (merge_and_unload) "
                        "and give the merged models"
                    )
        finally:
            model.delete_adapter(name)
            model.base_model.set_adapter(active)

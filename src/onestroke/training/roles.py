"""How a role is made from the teacher: a copy, of the student as small as asked, or LoRA over the teacher's weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from onestroke.denoiser import Denoiser, clone_sharing
from onestroke.errors import InputError
from onestroke.settings import Settings

Role = TypeVar("Role", bound=nn.Module)


def make_role(net: Denoiser, player: str, settings: Settings) -> nn.Module:
    """A trainable copy of the frozen denoiser `net` for `player`, as `lora_rank` and, for the student, `layers` ask."""
    rank = settings.of("lora_rank", player, 0)
    if not rank:
        small = player == "student" and settings.layers < 1
        return (net.fewer(settings.layers) if small else copy.deepcopy(net)).requires_grad_(True)
    from peft import LoraConfig, inject_adapter_in_model

    role = clone_sharing(net)
    names = {name.rpartition(".")[2] for name, _ in role.named_modules()} | {name for name, _ in role.named_modules()}
    targets = [t for t in settings.lora_targets if any(n == t or n.endswith("." + t) for n in names)]
    if not targets:
        raise InputError(f"none of the lora_targets {settings.lora_targets} is a layer of the teacher's network.")
    alpha = settings.of("lora_alpha", player, rank)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    return inject_adapter_in_model(config, role, adapter_name=player)


def merged(net: Role) -> Role:
    """A copy without adapters: their product added to the weights. The shared weights are not touched."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, module.get_base_layer())
    return net


def adapters(net: nn.Module) -> dict[str, Tensor]:
    """The LoRA weights in a role, as "<layer>.lora_A.weight" and "<layer>.lora_B.weight"; empty for a full copy.

    The scale alpha / rank is multiplied into B: whoever reads them applies B A and nothing else.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Any] = {}
    for name, module in net.named_modules():
        if isinstance(module, LoraLayer):
            for key in module.active_adapters:
                found[f"{name}.lora_A.weight"] = module.lora_A[key].weight
                found[f"{name}.lora_B.weight"] = module.lora_B[key].weight * module.scaling[key]
    return {k: v.detach().cpu().float().clone(memory_format=torch.contiguous_format) for k, v in found.items()}

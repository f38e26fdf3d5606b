"""The optimisers of the players: AdamW, and AdamW with a state of 8 bits (bitsandbytes, arXiv 2110.02861)."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from onestroke.errors import InputError

SMALL = 4096
"""Parameters of fewer numbers keep a state of 32 bits."""
BLOCK = 256
"""Numbers that share one scale."""


def check_optimizer(name: str) -> None:
    """Raises InputError when what the setting `optimizer` names is not installed."""
    if name == "adamw8bit" and not find_spec("bitsandbytes"):
        raise InputError("optimizer=adamw8bit needs bitsandbytes: pip install 'onestroke[8bit]'.")


def make_optimizer(name: str, params: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """`adamw` or `adamw8bit` with these lr, betas and weight_decay. Raises InputError where it is not installed."""
    check_optimizer(name)
    return torch.optim.AdamW(params, fused=True, **options) if name == "adamw" else eight_bit()(params, **options)


def begin(optimizer: Any, device: torch.device) -> None:
    """Make the state of every parameter, so that a checkpoint has the same keys before the first round and after.

    The fused kernel reads how many steps were taken on `device`, where the parameters are when it runs.
    """
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):
                optimizer.init_state(group, p, i, j)
            else:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros((), device=device), **zeros}


def state_8bit(p: Tensor) -> dict[str, Tensor]:
    """The state of one parameter of `adamw8bit`: two numbers of a byte each per number, with a scale per block."""
    if p.numel() < SMALL:
        moments = {k: torch.zeros_like(p, dtype=torch.float32) for k in ("state1", "state2")}
    else:
        moments = {k: torch.zeros_like(p, dtype=torch.uint8) for k in ("state1", "state2")}
        blocks = -(-p.numel() // BLOCK)
        moments |= {k: torch.zeros(blocks, device=p.device) for k in ("absmax1", "absmax2")}
    return {"step": torch.zeros(()), **moments}


def eight_bit() -> Any:
    """bitsandbytes' AdamW8bit, with a state of tensors alone: checkpoints keep them, and they may be moved."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not used here
    from bitsandbytes.optim import AdamW8bit

    class TensorAdamW8bit(AdamW8bit):
        def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            self.state[p] = state_8bit(p)

        def update_step(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
            kept = self.state[p]
            codes: dict[str, Tensor] = self.name2qmap
            for k, v in list(codes.items()):
                codes[k] = v.to(p.device)  # once, and not again
            tables = {"qmap1": codes["dynamic"], "qmap2": codes["udynamic"]}
            self.state[p] = {**kept, **tables, "step": int(kept["step"])}
            super().update_step(group, p, gindex, pindex)
            self.state[p] = {**kept, "step": kept["step"].add_(1)}

    return TensorAdamW8bit

"""Networks that are diffusers transformers: SD3, SANA, PixArt, FLUX, Lumina 2, Z-Image, Qwen-Image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from onestroke.denoiser import SCALE, Denoiser, on_cpu, plain_attention, tapped
from onestroke.paths import Cond, Flow, Prediction, Table
from onestroke.teachers.branch import Branch
from onestroke.teachers.calls import Call, clock
from onestroke.teachers.depth import with_fewer_layers
from onestroke.teachers.nasa import steered

TAPS = 4


class DiTDenoiser(Denoiser):
    """A transformer over the tokens of the latent, on a flow or a discrete schedule, called as `call` says.

    Features are those after each quarter of its blocks, channels first: (B, C, L), of the image's tokens where the
    block keeps them apart from those of the text.
    """

    path: Flow | Table

    def __init__(self, transformer: nn.Module, path: Flow | Table, prediction: Prediction, call: Call):
        super().__init__(path, prediction)
        self.transformer, self.call = transformer, call
        self.branch: Branch | None = None
        blocks = block_names(transformer)
        ends = sorted({max(len(blocks) * (i + 1) // TAPS - 1, 0) for i in range(TAPS)})
        self.taps, self.bottleneck = tuple(blocks[i] for i in ends), (len(ends) - 1) // 2

    def fewer(self, layers: float) -> DiTDenoiser:
        small = copy.deepcopy(with_fewer_layers(self.transformer, layers))
        return DiTDenoiser(small, self.path, self.prediction, self.call).train(self.training)

    def predict(self, x, t, cond):
        dtype = next(self.transformer.parameters()).dtype
        taps = self.taps if self.tapping else ()
        cond, keys, count = self.shortened(x, cond)
        with plain_attention(x, keys, count), tapped(self.transformer, taps, tokens) as features:
            with steered(self.transformer, self.call, cond, self.branch):
                out = self.transformer(**self.call.arguments(x, clock(self.path, t), cond, dtype))[0]
        return self.call.answer(out, x.shape[1:]), tuple(f[: len(x)] for f in features)

    def shortened(self, x: Tensor, cond: Cond) -> tuple[Cond, int, int]:
        """The condition with one token for all the zeros at the end of the text, the number of keys of picture and
        text then, and how many keys the last one stands for.

        An SD3 without its third text encoder reads 256 of them. They have no places, so that they stay equal in all
        layers, and one of them that counts as often gives the same output for less. On a CPU alone: the fast kernels
        of a GPU take no weights for keys. Blocks that run again for gradient checkpointing would not know of it.
        """
        count, again = self.call.silent, getattr(self.transformer, "is_gradient_checkpointing", False)
        if count < 2 or SCALE in cond or self.branch is not None or again or not on_cpu(x):
            return cond, 0, 1
        text, config = cond["text"][:, : 1 - count], cast(Any, self.transformer.config)
        return {**cond, "text": text}, x[0, 0].numel() // config.patch_size**2 + text.shape[1], count


def block_names(net: nn.Module) -> list[str]:
    """The names of a transformer's blocks, in the order of the forward pass; refiners of the text are none."""
    stacks = {
        k: m for k, m in net.named_children() if isinstance(m, nn.ModuleList) and k.endswith(("blocks", "layers"))
    }
    return [f"{name}.{i}" for name, stack in stacks.items() for i in range(len(stack))]


def tokens(outputs: Sequence[Tensor]) -> Tensor:
    """The image's tokens (B, L, C) in the output of a block as (B, C, L); a joint block returns (text, image)."""
    return outputs[-1].transpose(1, 2)

"""Networks that are diffusers UNets: Stable Diffusion 1.5 and 2.1, SDXL."""

from __future__ import annotations

from torch import nn

from onestroke.branch import Branch
from onestroke.denoiser import Denoiser, plain_attention, tapped
from onestroke.nasa import steered
from onestroke.paths import Flow, Prediction, Table
from onestroke.teachers.calls import Call, clock


class UNetDenoiser(Denoiser):
    """A UNet2DConditionModel on a discrete schedule or a flow, called as `call` says.

    Without it: with text alone, cond["text"] (B, L, E). Features are those after each down, middle and up block.
    """

    path: Table | Flow

    def __init__(self, unet: nn.Module, path: Table | Flow, prediction: Prediction, call: Call | None = None):
        super().__init__(path, prediction)
        self.unet, self.call = unet, call or Call()
        downs, ups = (
            [f"{side}_blocks.{i}" for i in range(len(getattr(unet, f"{side}_blocks")))] for side in ("down", "up")
        )
        self.branch: Branch | None = None
        self.taps, self.bottleneck = (*downs, "mid_block", *ups), len(downs)

    def predict(self, x, t, cond):
        dtype = next(self.unet.parameters()).dtype
        with plain_attention(x), tapped(self.unet, self.taps) as features:
            with steered(self.unet, self.call, cond, self.branch):
                out = self.unet(**self.call.arguments(x, clock(self.path, t), cond, dtype))[0]
        return self.call.answer(out, x.shape[1:]), tuple(f[: len(x)] for f in features)

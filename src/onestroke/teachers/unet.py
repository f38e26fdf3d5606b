"""Networks that are diffusers UNets: Stable Diffusion 1.5 and 2.1, SDXL."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from onestroke.denoiser import SCALE, Halves, plain_attention, tapped
from onestroke.errors import InputError
from onestroke.paths import Cond, Flow, Prediction, Table
from onestroke.teachers.branch import Branch
from onestroke.teachers.calls import Call, clock
from onestroke.teachers.depth import with_fewer_layers
from onestroke.teachers.nasa import steered


class UNetDenoiser(Halves):
    """A UNet2DConditionModel on a discrete schedule or a flow, called as `call` says.

    Without it: with text alone, cond["text"] (B, L, E). Features are those after each down, middle and up block. The
    encoder is the down blocks and the middle one, the decoder the up blocks.
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

    def fewer(self, layers: float) -> UNetDenoiser:
        small = copy.deepcopy(with_fewer_layers(self.unet, layers))
        return UNetDenoiser(small, self.path, self.prediction, self.call).train(self.training)

    def predict(self, x, t, cond):
        dtype = next(self.unet.parameters()).dtype
        taps = self.taps if self.tapping else ()
        with plain_attention(x), tapped(self.unet, taps) as features:
            with steered(self.unet, self.call, cond, self.branch):
                out = self.unet(**self.call.arguments(x, clock(self.path, t), cond, dtype))[0]
        return self.call.answer(out, x.shape[1:]), tuple(f[: len(x)] for f in features)

    def _read(self, x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """The picture as it is passed, the embedding of the time and all that goes with it, and the text.

        Raises InputError for a network that reads more than these, and for one that is to be steered.
        """
        unet: Any = self.unet
        if SCALE in cond or self.branch is not None:
            raise InputError("negative prompts do not go with an encoder that runs once; leave them out.")
        given = self.call.arguments(x, clock(self.path, t), cond, next(unet.parameters()).dtype)
        sample, time, text = (given.pop(k) for k in ("sample", "timestep", "encoder_hidden_states"))
        added, guidance = given.pop("added_cond_kwargs", None) or {}, given.pop("timestep_cond", None)
        if more := [k for k, v in given.items() if v is not None and k != "return_dict"]:
            raise InputError(f"a UNet that reads {', '.join(more)} cannot be run in two halves yet.")
        emb = unet.time_embedding(unet.get_time_embed(sample, time), guidance)
        if (more_emb := unet.get_aug_embed(emb, text, added)) is not None:
            emb = emb + more_emb
        emb = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
        sample = 2 * sample - 1 if unet.config.center_input_sample else sample
        return sample, emb, unet.process_encoder_hidden_states(text, added)

    def encode(self, x, t, cond):
        unet: Any = self.unet
        with plain_attention(x):
            sample, emb, text = self._read(x, t, cond)
            h = unet.conv_in(sample)
            skips = (h,)
            for block in unet.down_blocks:
                h, more = block(hidden_states=h, temb=emb, **_text(block, text))
                skips += more
            h = unet.mid_block(h, emb, **_text(unet.mid_block, text))
        return (x, h, *skips)

    def decode(self, found, t, cond):
        unet: Any = self.unet
        x, h, *skips = found
        with plain_attention(x):
            sample, emb, text = self._read(x, t, cond)
            uneven = any(n % 2**unet.num_upsamplers for n in sample.shape[-2:])
            for block in unet.up_blocks:
                count = len(block.resnets)
                own, skips = tuple(skips[-count:]), skips[:-count]
                size = skips[-1].shape[2:] if uneven and skips else None
                h = block(
                    hidden_states=h, temb=emb, res_hidden_states_tuple=own, upsample_size=size, **_text(block, text)
                )
            if unet.conv_norm_out:
                h = unet.conv_act(unet.conv_norm_out(h))
            return self.call.answer(unet.conv_out(h), x.shape[1:]), ()


def _text(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    """The text, for a block that attends to it."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}

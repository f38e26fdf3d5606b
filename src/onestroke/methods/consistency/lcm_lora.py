"""LCM-LoRA: latent consistency as adapters alone, which go onto other networks of the same base too."""

from __future__ import annotations

from onestroke.method import Parts
from onestroke.methods.consistency.lcm import LCM


class LCMLoRA(LCM):
    """Luo et al., "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module".

    Latent consistency (see `lcm`) whose student is the frozen teacher with LoRA: an acceleration that can be added to
    other adapters of the base. The guidance is drawn but not told, and the target is the student itself, without
    gradient, instead of its average.

    grid, spread, distance: as in `lcm`.
    Ours: without a lora_rank of the run every weight is trained, under the same loss, and so it is checked on exact
    teachers.
    Published settings: rank 64 on attention, feed-forward, convolutions and the blocks' time projection, which is
    lora_targets; AdamW 1e-4, clip 1.
    """

    paper = "LCM-LoRA, arXiv 2311.05556"
    defaults = {
        **LCM.defaults,
        "lr": {"student": 1e-4},
        "lora_rank": {"student": 64},
        "lora_targets": [
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
        ],
    }

    def __init__(self, parts: Parts, grid: int = 50, spread: float = 0.5, distance: str = "huber"):
        super().__init__(parts, grid, spread, embed=False, keep=0.0, distance=distance)

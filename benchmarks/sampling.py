"""What does a student's call add? The time of one-step sampling over that of one denoiser pass and the decoder.

A student, from conditions to pictures (B, 3, H, W), against its bare network and decoder, called by hand on the same
tensors. Both are timed in turn in one process; the figure is the median over the pairs, and beside it stands that of
the shortest times, which other work on the machine disturbs least. Two networks: the built-in teacher emoji64, and a
larger UNet of random weights on 32 x 32 latents, with a tenth of the pairs.

python -m benchmarks.sampling [--pairs 200] [--batch-size 4] [--threads N] [--compile] [--channels-last]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from onestroke.students.student import Student
from onestroke.teachers import BUILT_IN
from onestroke.teachers.pipeline import PipelineTeacher

TEACHER = "emoji64"
WARM = 3  # calls of each before the first that counts


def larger() -> PipelineTeacher:
    """A pipeline with emoji64's text encoder and a network of more work."""
    pipeline = PipelineTeacher.load(BUILT_IN / TEACHER).pipeline
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 384),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=pipeline.unet.config.cross_attention_dim,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    parts = {k: v for k, v in pipeline.components.items() if k in ("text_encoder", "tokenizer", "scheduler")}
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return PipelineTeacher(diffusers.StableDiffusionPipeline(unet=unet, vae=vae, **parts, **more), "a larger UNet")


def bare(model: PipelineTeacher, cond: Any, noise: Tensor) -> Callable[[], Tensor]:
    """One pass of the network and one of the decoder, on tensors that are there."""
    unet, vae = model.pipeline.unet, model.pipeline.vae
    t, factor = torch.full((len(noise),), 999.0), vae.config.scaling_factor or 1.0

    @torch.no_grad()
    def one() -> Tensor:
        z = unet(noise, t, encoder_hidden_states=cond["text"], return_dict=False)[0]
        return vae.decode(z / factor, return_dict=False)[0].div(2).add(0.5).clamp(0, 1)

    return one


def measure(model: PipelineTeacher, batch_size: int, args: argparse.Namespace) -> None:
    if args.channels_last:
        for part in (model.pipeline.unet, model.pipeline.vae):
            part.to(memory_format=torch.channels_last)
    student = Student(model, {"student_steps": 1})
    if args.compile:
        model.pipeline.unet.compile()
    cond = model.encode(["a red apple"] * batch_size)
    noise = torch.randn(batch_size, *model.shape)
    works = (lambda: model.decode(student.latents(cond)), bare(model, cond, noise))

    def timed(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    pairs = []
    for k in range(WARM + args.pairs):
        order = works if k % 2 else works[::-1]
        times = {work: timed(work) for work in order}
        if k >= WARM:
            pairs.append((times[works[0]], times[works[1]]))
    ratios = [a / b for a, b in pairs]
    spread = statistics.quantiles(ratios, n=4)
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    best = min(a for a, _ in pairs) / min(b for _, b in pairs)
    how = "".join(f", {name}" for name in ("compile", "channels_last") if getattr(args, name))
    print(
        f"sampling {statistics.median(ratios):.3f}: one step {1000 * ours:.1f} ms, bare pass and decoder "
        f"{1000 * theirs:.1f} ms (medians of {len(pairs)} pairs, quartiles of the ratio {spread[0]:.3f} to "
        f"{spread[2]:.3f}, ratio of the shortest times {best:.3f}; {model.name}, batch {batch_size}, "
        f"{args.threads} threads{how})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="a tenth of them on the larger")
    parser.add_argument("--batch-size", type=int, default=4, help="of emoji64; 1 of the larger")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(PipelineTeacher.load(BUILT_IN / TEACHER, TEACHER), args.batch_size, args)
    args.pairs = max(args.pairs // 10, 2)
    measure(larger(), 1, args)


if __name__ == "__main__":
    main()

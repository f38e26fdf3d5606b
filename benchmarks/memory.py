"""Is the planned memory the measured one? And what do LoRA roles cost beside plain LoRA fine-tuning?

python -m benchmarks.memory            planned and measured peaks of runs on this machine's CPU
python -m benchmarks.memory --sdxl     SwiftBrush with LoRA roles over plain LoRA fine-tuning, on the SDXL-shape UNet

A measured run is a process of its own (Linux): the growth of its largest resident set over what the libraries hold
once they have run, with the allocator told to give freed blocks back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from onestroke import terms, times
from onestroke.denoiser import fused_attention
from onestroke.method import Batch, Method, Parts, Turn
from onestroke.methods import get_method
from onestroke.plan import FakeTensorMode, play_plan
from onestroke.run import plan_run
from onestroke.settings import Settings
from onestroke.teachers.calls import Call
from onestroke.teachers.pipeline import table_of
from onestroke.teachers.unet import UNetDenoiser

CASES: list[dict[str, Any]] = [
    {"batch_size": 96},
    {"batch_size": 96, "lora_rank": {"*": 16}},
    {"batch_size": 96, "gradient_checkpointing": True},
    {"batch_size": 48, "accumulate": 2, "lora_rank": {"*": 16}, "ema": 0.0},
]


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def rounds(teacher: str, method: str, settings: dict[str, Any]) -> None:
    """Two real rounds."""
    from onestroke.run import parts_of
    from onestroke.teachers import load_teacher
    from onestroke.training.train import Data, Trainer

    _, run, chosen = plan_run(teacher, method, ["prompt"], settings)
    loaded = load_teacher(teacher)
    playing = get_method(method)(parts_of(loaded, run), **chosen)
    data = Data(loaded.shape, loaded.encode(["prompt"] * run.batch_size * run.accumulate))
    trainer = Trainer(playing, data, replace(run, log_with="none"))
    for _ in range(2):
        trainer.one_round(0.0)


def measure(teacher: str, method: str, settings: dict[str, Any]) -> int:
    """Bytes by which two rounds let this process grow, over what the libraries hold once they have run."""
    run = plan_run(teacher, method, ["prompt"], settings)[1]
    rounds("emoji64", method, {"batch_size": 1, "lora_rank": {"*": 1}, "precision": run.precision})
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the largest resident set starts anew
    rounds(teacher, method, settings)
    return status("VmHWM") - before


def measured(teacher: str, method: str, settings: dict[str, Any]) -> int:
    """`measure` in a process of its own."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    words = [sys.executable, "-m", "benchmarks.memory", "--measure", json.dumps([teacher, method, settings])]
    said = subprocess.run(words, env={**os.environ, **allocator}, capture_output=True, text=True, check=True)
    return int(said.stdout.split()[-1])


SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The UNet of SDXL (arXiv 2307.01952, table 1), in the words of diffusers."""


def sdxl_teacher() -> Any:
    """That network without storage, called as its pipeline calls it, at 1024 pixels."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = UNet2DConditionModel(**SDXL)
    rows = {"encoder_hidden_states": "text"} | {f"added_cond_kwargs.{k}": k for k in ("text_embeds", "time_ids")}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    net = UNetDenoiser(unet, table_of(betas), "eps", Call(rows=rows)).requires_grad_(False)
    null = {"text": torch.zeros(1, 77, 2048), "text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    more: dict[str, Any] = {"conditions": None, "park": lambda: None}
    return SimpleNamespace(net=net, path=net.path, null=null, shape=(4, 128, 128), **more)


class FineTuning(Method):
    """Plain fine-tuning of the teacher on its own data, for comparison."""

    players, paper, passes = ("student",), "none", {"student": 1}

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.student, self.path = parts.student, parts.path

    def step(self, batch: Batch, step: int):
        t = times.uniform(batch.draw, self.path)
        yield Turn("student", {"dsm": terms.dsm(self.student, self.path, batch.noise, batch.cond, t, batch.draw)})


def compare(rank: int, batch_size: int, **settings: Any) -> None:
    """SwiftBrush with LoRA roles over plain LoRA fine-tuning, on the SDXL shape."""
    run = Settings(batch_size=batch_size, lora_rank={"*": rank}, log_with="none", guidance_scale=4.5, **settings)
    with fused_attention():  # as on the GPU that this is for
        peaks = [play_plan(sdxl_teacher, m, run, {}).peak for m in (FineTuning, get_method("swiftbrush"))]
    words = ", ".join(f"{k}={v}" for k, v in settings.items()) or "float32"
    print(
        f"| rank {rank}, batch {batch_size}, {words} | {peaks[0] / 2**30:.2f} | {peaks[1] / 2**30:.2f} "
        f"| {peaks[1] / peaks[0]:.3f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--teacher", default="emoji64")
    parser.add_argument("--method", default="swiftbrush")
    parser.add_argument("--sdxl", action="store_true")
    args = parser.parse_args()
    if args.measure:
        print(measure(*json.loads(args.measure)))
        return
    if args.sdxl:
        print("| run | fine-tuning GiB | SwiftBrush GiB | ratio |\n|---|---|---|---|")
        for settings in ({}, {"precision": "bf16"}, {"precision": "bf16", "gradient_checkpointing": True}):
            compare(64, 1, **settings)
        return
    from onestroke.plan import plan

    print("| settings | planned MiB | measured MiB | planned / measured |\n|---|---|---|---|")
    for settings in CASES:
        planned = plan(args.teacher, args.method, **settings).peak
        found = measured(args.teacher, args.method, settings)
        text = ", ".join(f"{k}={v}" for k, v in settings.items())
        print(f"| {text} | {planned / 2**20:.0f} | {found / 2**20:.0f} | {planned / found:.3f} |", flush=True)


if __name__ == "__main__":
    main()

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
from typing import Any

from onestroke.run import plan_run

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
    from onestroke.methods import get_method
    from onestroke.run import made
    from onestroke.teachers import load_teacher
    from onestroke.train import Data, Trainer

    _, run, chosen = plan_run(teacher, method, ["prompt"], settings)
    loaded = load_teacher(teacher)
    playing, _ = made(loaded, get_method(method), run, chosen)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--teacher", default="emoji64")
    parser.add_argument("--method", default="swiftbrush")
    args = parser.parse_args()
    if args.measure:
        print(measure(*json.loads(args.measure)))
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

"""What does the library add? The time of one round over the time of the bare network passes that it needs.

A round is the real Trainer's, on the built-in teacher emoji64 by SwiftBrush with the settings of its recipe. The bare
passes are written out by hand on the same networks, batch and threads: the student forward and backward, the guided
teacher and the fake score, guided where the recipe says so, without gradient, the fake score forward and backward, and
the two optimiser steps.
Both are timed in turn in one process; the figure is the median over the pairs.

python -m benchmarks.overhead [--pairs 100] [--batch-size 24] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onestroke.denoiser import plain_attention
from onestroke.method import Parts
from onestroke.methods import get_method, options
from onestroke.paths import Cond, Table
from onestroke.run import read_prompts, recipe_layers
from onestroke.sampling import FewStep
from onestroke.settings import resolve
from onestroke.teachers import BUILT_IN, built_in, load_teacher
from onestroke.teachers.pipeline import UNetDenoiser, table_of
from onestroke.training.roles import make_role
from onestroke.training.train import Data, Trainer

TEACHER, METHOD = "emoji64", "swiftbrush"
LEAST: dict[str, Any] = {"batch_size": 24}
WARM = 3  # rounds of each before the first that counts


def stand_in() -> tuple[nn.Module, Data, Cond]:
    """A network of emoji64's size with random weights, for a checkout without the built-in teacher."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
    )
    path: Table = table_of({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
    text = torch.randn(500, 24, 192)
    net = UNetDenoiser(unet, path, "v").requires_grad_(False).eval()
    return net, Data((16, 8, 8), {"text": text}), {"text": text[:1]}


def setting() -> tuple[str, nn.Module, Data, Cond]:
    """The teacher's name, its frozen denoiser, the prompts' conditions and the null condition."""
    torch.manual_seed(0)
    if TEACHER not in built_in():
        return f"a stand-in for {TEACHER}", *stand_in()
    teacher = load_teacher(TEACHER)
    prompts = read_prompts(BUILT_IN / TEACHER / "prompts.txt")[:500]
    return TEACHER, teacher.net, Data(teacher.shape, teacher.encode(prompts)), teacher.null


def make_trainer(net: nn.Module, data: Data, null: Cond, given: dict[str, Any]) -> Trainer:
    cls = get_method(METHOD)
    run, chosen = resolve(given, options(cls), cls.players, LEAST, cls.defaults, *recipe_layers(TEACHER, METHOD))
    few = FewStep(net.path, net.path.grid(1))
    student = make_role(net, "student", run)
    parts = Parts(net, student, lambda role: make_role(net, role, run), few, null, run.guidance_scale)
    return Trainer(cls(parts, **chosen), data, run)


def bare_round(trainer: Trainer) -> Callable[[], None]:
    """The network passes and optimiser steps of one round and nothing else."""
    method, run = trainer.method, trainer.settings
    student, fake, teacher = (getattr(method, role).unet for role in ("student", "fake", "teacher"))
    params = [[p for p in net.parameters() if p.requires_grad] for net in (student, fake)]
    optimisers = [torch.optim.AdamW(p, lr=0.0, fused=True) for p in params]
    batch = trainer.batches(0)[0]
    x, text = batch.noise, batch.cond["text"]
    t = torch.full((len(x),), 500.0)
    guided = run.guidance_scale != 1
    once = (x, t, text)
    twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, text])) if guided else once

    def call(net: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with trainer.accelerator.autocast(), plain_attention(x):
            return net(x, t, encoder_hidden_states=text, return_dict=False)[0]

    def learn(net: nn.Module, optimiser: torch.optim.Optimizer, watch: Callable[[], None] = lambda: None) -> None:
        out = call(net, x, t, text)
        watch()
        out.float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def look() -> None:
        call(teacher, *twice)
        call(fake, *(twice if method.guide_fake else once))

    def one() -> None:
        learn(student, optimisers[0], look)
        learn(fake, optimisers[1])

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=None, help="default: the recipe's, else 24")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = {} if args.batch_size is None else {"batch_size": args.batch_size}
    name, net, data, null = setting()
    trainer = make_trainer(net, data, null, given | {"log_with": "none", "accumulate": 1})
    bare = bare_round(trainer)

    def timed(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def whole() -> None:
        trainer.one_round(0.0)

    pairs = []
    for k in range(WARM + args.pairs):
        first, second = (whole, bare) if k % 2 else (bare, whole)
        times = {first: timed(first), second: timed(second)}
        if k >= WARM:
            pairs.append((times[whole], times[bare]))
    ratio = statistics.median(a / b for a, b in pairs)
    spread = statistics.quantiles([a / b for a, b in pairs], n=4)
    whole_s, bare_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"overhead {ratio:.3f}: one round of {METHOD} {whole_s:.3f} s, bare network passes {bare_s:.3f} s "
        f"(medians of {len(pairs)} pairs, quartiles of the ratio {spread[0]:.3f} to {spread[2]:.3f}; {name}, "
        f"batch {trainer.settings.batch_size}, {args.threads} threads)"
    )


if __name__ == "__main__":
    main()

"""What the stages of the emoji64 recipe share: the data, its split and poses, and one resumable training loop."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HELD_OUT = 0.05
SIZE, TILT = (0.65, 0.95), math.radians(15)
POSES = 16
STYLES = {
    "fluent3d": "fluent 3d",
    "fluentflat": "fluent flat",
    "fluentmodern": "fluent modern",
    "noto": "noto",
    "twemoji": "twemoji",
}


def held_out(hexcode: str) -> bool:
    """Whether a concept (its code points) is held out. By concept, never by image: a hash decides."""
    return int.from_bytes(hashlib.sha256(hexcode.encode()).digest()[:4], "big") < HELD_OUT * 2**32


def caption(row: dict) -> str:
    """Style and name, as the teacher reads it: 'noto, hot beverage'."""
    return f"{STYLES[row['style']]}, {row['caption'].lower()}"


def load_data(folder: Path) -> tuple[Tensor, list[dict], np.ndarray]:
    """Images (N, 3, 64, 64) uint8, their rows, and a boolean mask (N,) of the held-out ones."""
    images = np.load(folder / "emoji64_base_permissive.npz")["x"]
    rows = json.loads((folder / "emoji64_base_permissive.json").read_text())
    return torch.from_numpy(images).permute(0, 3, 1, 2), rows, np.array([held_out(r["hex"]) for r in rows])


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in -1..1."""
    return images.float().div(127.5).sub(1)


def posed(images: Tensor) -> Tensor:
    """Every image (N, 3, 64, 64) in -1..1 at a random size, tilt and place on its white ground."""
    size, tilt, x, y = torch.rand(4, len(images), device=images.device)
    size, tilt = SIZE[0] + (SIZE[1] - SIZE[0]) * size, TILT * (2 * tilt - 1)
    x, y = ((2 * v - 1) * (1 - size) for v in (x, y))
    c, s = tilt.cos() / size, tilt.sin() / size
    rows = (torch.stack([c, s, -c * x - s * y], 1), torch.stack([-s, c, s * x - c * y], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [len(images), 3, 128, 128], align_corners=False)
    ink = F.interpolate(images - 1, scale_factor=2, mode="bicubic")  # zero is white, also beyond the border
    return (F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2) + 1).clamp(-1, 1)


@torch.no_grad()
def posed_latents(vae: nn.Module, images: Tensor, path: Path, device: str) -> Tensor:
    """Latents (POSES, N, 16, 8, 8), float16, of uint8 images (N, 3, 64, 64) in as many random poses; kept at `path`."""
    if not path.exists():
        torch.manual_seed(0)
        vae, found = vae.to(device, memory_format=torch.channels_last), []
        for part in (part for _ in range(POSES) for part in images.split(256)):
            x = posed(to_float(part.to(device))).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16):
                z = vae.encode(x).latents
            found.append((z.float() * vae.config.scaling_factor).half().cpu())
        save_file({"latents": torch.cat(found).unflatten(0, (POSES, -1)).contiguous()}, path)
    return load_file(path)["latents"].to(device)


def arguments(stage: str, steps: int, **more) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=stage)
    parser.add_argument("--data", type=Path, required=True, help="folder written by data.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; a stage found there resumes")
    parser.add_argument("--start", type=Path, help="a saved pipeline to continue from")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    for name, default in more.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def schedule(step: int, steps: int, hold: float, warmup: int = 200, floor: float = 0.01) -> float:
    """Linear warm-up, constant for the part `hold` of the run, then cosine decay to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, hold * steps)
    done = max(0.0, (step - start) / max(1.0, steps - start))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix to g (m, n), roughly, by the quintic Newton-Schulz iteration of Muon."""
    x = g.bfloat16() / (g.norm() + 1e-7)
    if tall := len(x) > x.shape[1]:
        x = x.T.contiguous()
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).to(g)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz for weights of two and more axes; Adam for the others.

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), with the update scaled to Adam's
    root mean square (0.2 sqrt(max(m, n))) as in arXiv 2502.16982, so that both parts share one learning rate.
    """

    def __init__(self, params, lr: float, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay, adam=False))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, matrix = self.state[p], p.ndim > 1 and not group["adam"]
                if not state:
                    state.update(
                        step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p[:0] if matrix else p)
                    )
                state["step"] += 1
                if matrix:
                    state["exp_avg"].lerp_(p.grad, 1 - group["momentum"])
                    g = p.grad.lerp(state["exp_avg"], group["momentum"]).flatten(1)
                    update = orthogonal(g).view_as(p) * 0.2 * max(g.shape) ** 0.5
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                else:
                    (b1, b2), k = group["betas"], state["step"]
                    state["exp_avg"].lerp_(p.grad, 1 - b1)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                    update = state["exp_avg"] / (1 - b1**k) / ((state["exp_avg_sq"] / (1 - b2**k)).sqrt() + 1e-8)
                p.add_(update, alpha=-group["lr"])


def train(
    net: nn.Module,
    loss: Callable[[int], Tensor],
    path: Path,
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    ema: float = 0.999,
    clip: float = 1.0,
    hold: float = 0.0,
    every: int = 500,
    report: Callable[[], Iterable[str]] = tuple,
) -> None:
    """Minimise loss(step) over net's parameters and leave the EMA weights in net; resumes from `path`.

    The random state is seeded by the step, so an interrupted run continues with the draws it would have made.
    """
    params = {k: p for k, p in net.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in params.items()}
    tables = {p for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups = [{"params": [p for p in params.values() if (p in tables) == adam], "adam": adam} for adam in (False, True)]
    optim = Muon(groups, lr=lr, weight_decay=weight_decay)
    start = 0
    if path.exists():
        state = load_file(path)
        start = int(state.pop("step"))
        net.load_state_dict({k[4:]: v for k, v in state.items() if k.startswith("net.")})
        average = {k: state["ema." + k].to(p.device) for k, p in params.items()}
        for k, p in params.items():
            optim.state[p] = {m: state[f"{m}.{k}"].to(p.device) for m in ("exp_avg", "exp_avg_sq")}
            optim.state[p]["step"] = start
    began, total = time.time(), 0.0
    for step in range(start, steps):
        torch.manual_seed(step)
        np.random.seed(step)
        for group in optim.param_groups:
            group["lr"] = lr * schedule(step, steps, hold)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(params.values(), clip)
        optim.step()
        optim.zero_grad(set_to_none=True)
        decay = min(ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - decay)
        total += value.item()
        if (step + 1) % every == 0 or step + 1 == steps:
            live = {k: p.detach().clone() for k, p in params.items()}
            net.load_state_dict(average, strict=False)
            net.eval()
            lines = " ".join(report())
            net.load_state_dict(live, strict=False)
            net.train()
            seconds = (time.time() - began) / (step + 1 - start)
            print(f"step {step + 1} loss {total / every:.5f} {lines} ({seconds:.3f} s/step)", flush=True)
            total = 0.0
            state = {"step": torch.tensor(step + 1)}
            state |= {"net." + k: v for k, v in net.state_dict().items()}
            state |= {"ema." + k: v for k, v in average.items()}
            for k, p in params.items():
                state |= {f"{m}.{k}": optim.state[p][m] for m in ("exp_avg", "exp_avg_sq")}
            save_file({k: v.contiguous() for k, v in state.items()}, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
    net.load_state_dict(average, strict=False)
    net.eval()

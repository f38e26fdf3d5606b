"""Small instances of any method, by name alone: what the contract tests run on."""

from __future__ import annotations

import copy
import zlib
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from onestroke.draws import Draws
from onestroke.method import Batch, Method, Pairs, Parts
from onestroke.methods import get_method, options
from onestroke.paths import Cond
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.solvers import way
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.training.roles import make_role
from onestroke.training.train import Data, Trainer
from onestroke.truth import Net
from truth.checks import make_path

PATHS = ("vp", "edm", "flow", "trig", "table", "table0")
LABELS = 3
ROWS = 24
PHASES: dict[str, dict[str, Any]] = {
    "disback": {"prelude": 2, "record": 1, "interval": 1},
    "guided-distillation": {"guide_steps": 1, "start": 2, "stage_steps": 1},
    "hyper-sd": {"stage_steps": 1, "score_weight": 1.0},
    "instaflow": {"straighten": 2},
    "mlcm": {"stage_steps": 1},
    "progressive": {"start": 4, "stage_steps": 1},
    "slimflow": {"anneal": 2, "straighten": 1},
    "speedupnet": {"guide_steps": 1},
}
"""Options of methods in phases with which four rounds play all of them."""
FAST = {"student": 1e-3, "fake": 1e-3}
SHORT: dict[str, dict[str, Any]] = {
    "adm": {"lr": {"student": 3e-4, "heads": 2e-2, "fake": 1e-3}, "ema": 0.995},
    "agd": {"student_steps": 8, "solver_steps": 40},
    "boss": {"solver_steps": 10},
    "ct": {"growth": 0},
    "decoupled-dmd": {"lr": {"student": 3e-4, "fake": 1e-3}, "betas": {"*": [0.0, 0.99]}},
    "disback": {"lr": FAST},
    "ect": {"stage_steps": 0},
    "guided-distillation": {"guide_steps": 20, "start": 16, "stage_steps": 30},
    "hyper-sd": {"grid": 16, "keep": 0.5, "stage_steps": 0},
    "ict": {"stage_steps": 0},
    "instaflow": {"straighten": 0},
    "lcm": {"grid": 50},
    "lcm-lora": {"grid": 50},
    "mlcm": {"keep": 0.5, "stage_steps": 0},
    "pcm": {"grid": 12, "keep": 0.5},
    "pg-sb": {"lr": FAST, "null_rate": 0.1},
    "progressive": {"stage_steps": 0, "lr": 3e-3},
    "rcm": {"ramp": 50, "lr": 1e-3, "ema": 0.995},
    "sana-sprint": {"ramp": 50, "lr": 1e-3, "ema": 0.995},
    "scm": {"ramp": 50, "lr": 1e-3, "ema": 0.995},
    "scott": {"grid": 50},
    "sign": {"lr": FAST},
    "slam": {"grid": 50},
    "slimflow": {"anneal": 0, "straighten": 0},
    "speedupnet": {"hops": 1},
    "swiftbrush": {"lr": FAST},
    "swiftbrush-v2": {"lr": FAST},
    "tcd": {"grid": 10, "keep": 0.5},
    "tiue": {"hi": 0.6, "lr": {"student": 3e-4, "fake": 2e-3}},
    "vsd": {"lr": FAST},
}
"""Options of methods in phases, or of long chains of steps, and rates, for a run whose rounds are known and few:
recipes/exact is for one that ends by the clock."""


class WideData(Data):
    """Data whose noise is float64, for exact comparisons."""

    def batch(self, draw: Draws, device: torch.device) -> Batch:
        batch = super().batch(draw, device)
        return batch._replace(noise=batch.noise.double())


def small_net(path, prediction: str, role: str) -> Net:
    """A net of float64, of its own weights per role: nothing of it is zero."""
    torch.manual_seed(zlib.crc32(role.encode()))
    net = Net(path, prediction, 2, LABELS, 1.0, width=8)
    nn.init.normal_(net.leave.weight, std=0.2)
    nn.init.normal_(net.leave.bias, std=0.2)
    return net.double()


class Layered(nn.Module):
    """The estimate of one denoiser with the tapped layers of another."""

    def __init__(self, net: nn.Module, layers: nn.Module):
        super().__init__()
        self.net, self.layers = net, layers

    def forward(self, x, t, cond):
        return self.net(x, t, cond)._replace(features=self.layers(x, t, cond).features)


def mixture(path, prediction: str = "x0") -> GaussianMixture:
    means = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64)
    return GaussianMixture(path, means, 0.3, labels=range(LABELS), prediction=prediction)


def at_once(name: str) -> dict[str, Any]:
    """The options with which every player plays all that it plays from the first round."""
    return {option: 0 for option in ("prelude", "gan_from") if option in options(get_method(name))}


def build(
    name: str,
    path: str = "vp",
    prediction: str = "v",
    guidance: float = 2.0,
    settings: Settings | None = None,
    **chosen: Any,
) -> Method:
    """The method on small nets of one path and prediction; every role starts elsewhere, or is LoRA where asked."""
    on = make_path(path, prediction)
    teacher = small_net(on, prediction, "teacher").requires_grad_(False)

    def copy_for(role: str) -> nn.Module:
        if settings and settings.of("lora_rank", role, 0):
            torch.manual_seed(zlib.crc32(role.encode()))
            return make_role(teacher, role, settings)
        return small_net(on, prediction, role)

    run = settings or Settings()
    few = FewStep(on, on.grid(run.student_steps), renoise=run.renoise)
    null = {"label": torch.tensor([-1])}
    about: dict[str, Any] = {"rounds": run.steps, "solver_steps": run.solver_steps}
    parts = Parts(teacher, copy_for("student"), copy_for, few, null, guidance, (2,), reward, **about)
    return get_method(name)(parts, **{**at_once(name), **chosen})


def reward(x0: torch.Tensor, cond: Cond) -> torch.Tensor:
    """Minus half the squared distance to a point of the label."""
    at = torch.stack([cond["label"].cos(), cond["label"].sin()], 1)
    return -(x0 - at).square().sum(1) / 2


@lru_cache
def data(path: str = "vp", rows: int = ROWS) -> WideData:
    """Labels, and real samples, pairs and ways for the methods that need them."""
    label, generator = torch.arange(rows) % LABELS, torch.Generator().manual_seed(0)
    teacher, noise = mixture(make_path(path)), torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    ways = way(teacher, teacher.path, noise, {"label": label}, Settings().solver_steps)
    return WideData((2,), {"label": label}, teacher.sample(label, generator), Pairs(noise, ways[:, -1]), ways)


def batch(path: str = "vp", size: int = 8, step: int = 0) -> Batch:
    return data(path).batch(Draws(0, step, size), torch.device("cpu"))


def settings_of(**changes: Any) -> Settings:
    """The settings of a short, lively run: a large rate, a quick average, decoupled weight decay and clipping."""
    table: dict[str, Any] = {
        "steps": 4,
        "batch_size": 8,
        "lr": {"*": 1e-2},
        "weight_decay": 0.1,
        "warmup": 2,
        "decay": "cosine",
        "clip": 0.5,
        "ema": 0.8,
        "save_every": 1000,
        "log_with": "none",
    }
    return Settings(**{**table, **changes})


def trained(name: str, folder=None, rounds: int | None = None, resume: bool = False, **changes: Any) -> Trainer:
    """A trainer of a small method that has played until `rounds`; saved there if it has a folder."""
    settings = settings_of(**changes)
    trainer = Trainer(build(name, settings=settings), data(), settings, folder)
    if resume:
        trainer.resume()
    while trainer.round < (settings.steps if rounds is None else rounds):
        trainer.one_round(trainer.round / settings.steps)
    if folder is not None:
        trainer.save()
    return trainer


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every trained number of a run, by name: weights, optimiser state and the student's average."""
    found: dict[str, torch.Tensor] = {}
    for player in trainer.method.players:
        live = {k: p for k, p in trainer.bare(player).named_parameters() if p.requires_grad}
        names = {p: k for k, p in live.items()}
        found |= {f"{player}/{k}": p for k, p in live.items()}
        for p, state in trainer.optimisers[player].state.items():
            found |= {f"{player}/{names[p]}/{k}": torch.as_tensor(v) for k, v in state.items()}
    if trainer.average:
        found |= {f"average/{k}": v for k, v in trainer.average.values.items()}
    for target in trainer.method.targets:
        found |= {f"{target}/{k}": v for k, v in getattr(trainer.method, target).state_dict().items()}
    return {k: whole(v).detach().clone() for k, v in found.items()}


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())

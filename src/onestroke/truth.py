"""Does a method find the truth? Distil an exact teacher from a fitted net, and measure against its own samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from onestroke import terms, times
from onestroke.denoiser import Halves, clone_sharing, kept_of, spaced
from onestroke.draws import Draws
from onestroke.errors import InputError, unknown
from onestroke.method import Batch, Method, Pairs, Parts, Reward, Turn
from onestroke.methods import METHODS, get_method, options
from onestroke.pairs import spread_guide
from onestroke.paths import EDM, VP, Cond, Flow, Path, Prediction, like
from onestroke.run import recipe_layers
from onestroke.sampling import FewStep
from onestroke.settings import Settings, resolve
from onestroke.solvers import solve, way
from onestroke.teachers.gaussian import GaussianMixture
from onestroke.training.roles import make_role
from onestroke.training.train import Data, Trainer

SAMPLES = 20_000
MANY = 100
"""Steps in which a guided teacher's samples are drawn; of an exact teacher without guidance they are exact."""
DEFAULTS: dict[str, Any] = {
    "steps": 1_000_000,
    "batch_size": 1024,
    "lr": {"*": 1e-3},
    "betas": {"*": [0.0, 0.99]},
    "decay": "cosine",
    "clip": 10.0,
    "ema": 0.995,
    "guidance_scale": 1.0,
    "lora_rank": {"*": 0},
    "log_with": "none",
}


class Net(Halves):
    """A small residual MLP with labels: the stand-in for a UNet where the teacher is exact.

    Input and, for x0 prediction, output are preconditioned as in EDM (arXiv 2206.00364, table 1) with sigma_data. In
    halves, the first layer is the encoder, and all others, which alone read time and label, the decoder.
    """

    clock = "time"

    def __init__(self, path: Path, prediction: Prediction, dim: int, classes: int, sigma_data: float, width: int = 128):
        super().__init__(path, prediction)
        self.sigma_data = sigma_data
        self.embed = nn.Embedding(classes + 1, width)  # row 0 is label -1, every class
        self.time, self.enter = nn.Linear(17, width), nn.Linear(dim, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def encode(self, x, t, cond):
        a, b = (c.to(x) for c in self.path.ab(t))
        return x, self.enter(x / like(torch.hypot(a * self.sigma_data, b), x))

    def decode(self, found, t, cond):
        x, h = found
        a, b = (c.to(x) for c in self.path.ab(t))
        level = torch.atan2(b, a * self.sigma_data)  # 0 .. pi / 2, smooth through both ends
        waves = torch.arange(1, 5, device=x.device) * level[:, None] * 2
        noise = b.clamp_min(1e-4).log() - a.clamp_min(1e-4).log()
        waves2 = noise[:, None] * torch.tensor([0.25, 0.5, 1.0, 2.0], device=x.device)
        seen = torch.cat([waves.sin(), waves.cos(), waves2.sin(), waves2.cos(), noise[:, None] / 4], 1).to(x)
        h = h + self.time(seen) + self.embed(cond["label"] + 1)
        for layer in self.body:
            h = h + layer(nn.functional.silu(h))
        out = self.leave(nn.functional.silu(h))
        if self.prediction == "x0":
            return like(b * self.sigma_data / torch.hypot(a * self.sigma_data, b), x) * out, (h,)
        p, q = self.path.basis(t, self.prediction)
        return out * like((self.sigma_data**2 * p**2 + q**2).sqrt(), x), (h,)

    def fewer(self, layers: float) -> Net:
        small, count = clone_sharing(self), len(self.body)
        small.body = nn.ModuleList(self.body[i] for i in spaced(kept_of(count, layers), count))
        return copy.deepcopy(small)

    def estimate(self, x, out, t):
        if self.prediction == "x0":
            a, b = (c.to(x) for c in self.path.ab(t))
            out = like(a * self.sigma_data**2 / torch.hypot(a * self.sigma_data, b) ** 2, x) * x + out
        return super().estimate(x, out, t)


class Fit(Method):
    """Regress a net onto the exact teacher: how the fitted starting point is made."""

    players, paper, passes = ("net",), "none", {"net": 1, "teacher": 1}

    net: Net

    def __init__(self, net: Net, teacher: GaussianMixture):
        nn.Module.__init__(self)
        self.net, self.teacher, self.path = net, teacher, net.path

    def step(self, batch: Batch, step: int):
        t = times.uniform(batch.draw, self.path)
        assert batch.x0 is not None
        xt = self.path.mix(batch.x0, batch.noise, t)
        with torch.no_grad():
            exact = self.teacher(xt, t, batch.cond)
            target = self.path.join(exact.x0, exact.eps, t, self.net.prediction)
            p, q = self.path.basis(t, self.net.prediction)
            a, b = self.path.ab(t)
            scale = (self.net.sigma_data**2 * p**2 + q**2).rsqrt()
            if self.net.prediction == "x0":
                scale = torch.hypot(a * self.net.sigma_data, b) / (b * self.net.sigma_data)
        est = self.net(xt, t, batch.cond)
        out = self.path.join(est.x0, est.eps, t, self.net.prediction)
        yield Turn("net", {"fit": terms.reduced((like(scale, out) * (out - target)).square(), "mean")})


def sliced_w2(x: Tensor, y: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two samples (N, D) of the same size, over fixed random directions."""
    if len(x) != len(y):
        raise ValueError(f"sliced_w2 compares samples of one size, got {len(x)} and {len(y)}.")
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    directions = directions / directions.norm(dim=0)
    one, two = ((directions.T @ v.T).sort(1).values for v in (x, y))  # rows are sorted faster than columns
    return (one - two).square().mean().sqrt().item()


@dataclass(frozen=True)
class Convergence:
    """What `converge` measured. Distances are sliced-W2 of SAMPLES one- or few-step samples to as many true ones.

    Of a method whose target is the modes, they are distances to samples of the mixture without its spread; of one whose
    target is the guided teacher, to what that draws, in many steps or in as many.
    """

    sliced_w2: float
    floor: float  # between two samples of the teacher's law
    start: float  # of the fitted net at the same number of steps, before distilling
    per_label: dict[int, float]
    mode_weights: list[float]  # the part of the samples nearest to each component
    true_weights: list[float]
    student_steps: int
    rounds: int
    seconds: float  # of fitting, distilling and measuring

    @property
    def worst_mode(self) -> float:
        """The smallest part of the samples at a component, over that component's weight."""
        return min(w / true for w, true in zip(self.mode_weights, self.true_weights, strict=True))

    def passes(self, method: str, case: str) -> bool:
        """Within the limit of the method on one of CASES, with no mode under half its weight."""
        near = self.sliced_w2 <= min(limit(method, case) * self.floor, self.start / gain(method, case))
        return near and self.worst_mode >= 0.5

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _data(teacher: GaussianMixture, seed: int, null_rate: float = 0.1, count: int = 65_536) -> Data:
    generator = torch.Generator().manual_seed(seed + 1)
    share = torch.stack([teacher.weights[teacher.labels == c].sum() for c in teacher.classes])
    label = teacher.classes[torch.multinomial(share, count, replacement=True, generator=generator)]
    x0 = teacher.sample(label, generator)
    label = torch.where(torch.rand(count, generator=generator) < null_rate, -1, label)
    return Data(teacher.shape, {"label": label}, x0)


def _solved(parts: Parts, data: Data, run: Settings, ways: bool, spread: float = 0.0) -> Data:
    """With pairs of the exact teacher's solver, of the first conditions, or with its ways."""
    count = 16_384
    teacher = spread_guide(parts, torch.arange(count), spread)
    noise = torch.randn((count, *parts.shape), generator=torch.Generator().manual_seed(run.seed + 4))
    cond = {k: v[:count] for k, v in data.cond.items()}
    if not ways:
        x0 = solve(teacher, parts.path, noise, cond, run.solver_steps, run.solver)
        return replace(data, pairs=Pairs(noise, x0))
    states = way(teacher, parts.path, noise, cond, run.solver_steps)
    return replace(data, pairs=Pairs(noise, states[:, -1]), ways=states)


def fit(teacher: GaussianMixture, prediction: Prediction, seconds: float, seed: int = 0, steps: int = 1_000_000) -> Net:
    """A small net regressed onto the teacher for `seconds`, or for `steps` rounds if these end first."""
    torch.manual_seed(seed)
    data = _data(teacher, seed, 0.2)
    assert data.x0 is not None
    sigma_data = data.x0.square().mean().sqrt().item()
    net = Net(teacher.path, prediction, teacher.shape[0], int(teacher.labels.max()) + 1, sigma_data).to(teacher.means)
    settings = {**DEFAULTS, "lr": {"*": 3e-3}, "betas": {"*": [0.9, 0.99]}, "seed": seed, "steps": steps}
    trainer = Trainer(Fit(net, teacher), data, Settings(**settings))
    trainer.run(seconds)
    trainer.finish()
    return net


def inside(teacher: GaussianMixture) -> Reward:
    """Zero where a class has its samples, falling off outside: minus half the squared distance to where it is zero.

    That is within sqrt(D) + 3 deviations of a component, which one true sample in ten thousand is not. The truth
    maximises this reward, so that it stays the optimum of a method whatever weight the reward has there.
    """
    radius, size = teacher.shape[0] ** 0.5 + 3, teacher.std.square().mean(1).sqrt()

    def reward(x0: Tensor, cond: Cond) -> Tensor:
        label = cond["label"][:, None]
        away = ((x0[:, None] - teacher.means) / teacher.std).square().sum(-1)
        outside = (away.clamp_min(radius**2).sqrt() - radius) * size
        return -outside.masked_fill((label >= 0) & (label != teacher.labels), torch.inf).amin(1).square() / 2

    return reward


class Distilled(NamedTuple):
    """A student of an exact teacher, and what `measure` must know of how it was made."""

    method: str
    teacher: GaussianMixture
    student: nn.Module
    net: Net  # fitted: what the student began as
    guided: nn.Module  # the teacher under the guidance of the run
    few: FewStep  # as the run asks
    own: FewStep  # as the method calls its student
    seed: int
    rounds: int
    seconds: float


@torch.no_grad()
def distil(
    method: str,
    teacher: GaussianMixture,
    *,
    prediction: Prediction = "x0",
    student_steps: int | None = None,
    seconds: float = 60,
    seed: int = 0,
    reward: Reward | None = None,
    **settings: Any,
) -> Distilled:
    """Fit a small net to the exact teacher, and distil it by `method` for the rest of `seconds`: see `converge`."""
    began = time.monotonic()
    cls = get_method(method)
    between = {k: v for k, v in cls.defaults.items() if k == "renoise"}
    layers = ({"seed": seed}, DEFAULTS, between, *recipe_layers("exact", method))
    given = settings | ({"student_steps": student_steps} if student_steps else {})
    run, chosen = resolve(given, options(cls), cls.players, *layers)
    check_steps(method, run.student_steps)
    needs = cls.needs_of({**options(cls), **chosen})
    teacher = copy.deepcopy(teacher).float()  # the noise of training is float32
    with torch.enable_grad():
        net = fit(teacher, prediction, 0.2 * seconds, seed, run.steps).requires_grad_(False)
        torch.manual_seed(seed)  # of the players that begin at random, whatever the fit has drawn
        few = FewStep(teacher.path, teacher.path.grid(run.student_steps), renoise=run.renoise)

        def role(name: str) -> Any:
            return make_role(net, name, run)

        parts = Parts(
            copy.deepcopy(net) if "features" in needs else teacher,
            role("student"),
            role,
            few,
            teacher.null,
            run.guidance_scale,
            teacher.shape,
            reward or inside(teacher),
            run.steps,
            lambda prompts: {"label": torch.tensor([int(prompt) for prompt in prompts])},
            solver_steps=run.solver_steps,
        )
        data = _data(teacher, seed)
        if needs & {"pairs", "ways"}:
            spread = {**options(cls), **chosen}["spread"] if "sides" in needs else 0.0
            data = _solved(parts, data, run, "ways" in needs, spread)
        trainer = Trainer(cls(parts, **chosen), data, run)
        trainer.run(seconds - (time.monotonic() - began) - 0.03 * seconds)
    student, own, guided = trainer.finish(), getattr(trainer.method, "few", few), parts.guide(teacher)
    spent = time.monotonic() - began
    return Distilled(method, teacher, student, net, guided, few, own, seed, trainer.round, spent)


@torch.no_grad()
def measure(found: Distilled, drawn: int | None = None) -> Convergence:
    """What a student draws, in as many calls as it was trained for or in `drawn`, against its exact teacher.

    Raises InputError for more calls than the method trains.
    """
    began = time.monotonic()
    cls, teacher, seed, few, own = get_method(found.method), found.teacher, found.seed, found.few, found.own
    if drawn:
        check_steps(found.method, drawn)
        few, own = (replace(each, times=each.path.grid(drawn)) for each in (few, own))
    generator = torch.Generator().manual_seed(seed + 2)
    share = torch.stack([teacher.weights[teacher.labels == c].sum() for c in teacher.classes])
    label = teacher.classes[torch.multinomial(share, SAMPLES, replacement=True, generator=generator)]
    truth, again = teacher.sample(label, generator), teacher.sample(label, generator)
    noise, cond = torch.randn(truth.shape, generator=generator).to(truth), {"label": label}

    def draw(model: nn.Module, noise: Tensor, few: FewStep = few) -> Tensor:
        return few.sample(model, noise, cond, Draws(seed + 3, 0, SAMPLES))

    if cls.target.startswith("guided"):
        more = torch.randn((2, *truth.shape), generator=generator).to(truth)
        if cls.target == "guided":
            truth, again = (solve(found.guided, teacher.path, z, cond, MANY) for z in more)
        else:
            truth, again = (draw(found.guided, z) for z in more)
    floor = sliced_w2(again, truth)
    if cls.target == "modes":
        modes_alone = copy.deepcopy(teacher)
        modes_alone.std.zero_()
        truth = modes_alone.sample(label, generator)

    x, before = draw(found.student, noise, own), draw(found.net, noise)
    modes = torch.bincount(teacher.nearest(x), minlength=len(teacher.means)) / SAMPLES
    return Convergence(
        sliced_w2=sliced_w2(x, truth),
        floor=floor,
        start=sliced_w2(before, truth),
        per_label={int(c): sliced_w2(x[label == c], truth[label == c]) for c in teacher.classes},
        mode_weights=[round(w, 4) for w in modes.tolist()],
        true_weights=[round(w, 4) for w in teacher.weights.tolist()],
        student_steps=len(few.times),
        rounds=found.rounds,
        seconds=found.seconds + time.monotonic() - began,
    )


def check_steps(method: str, steps: int) -> None:
    """Raises InputError for a number of calls that a method does not train."""
    if steps > (most := get_method(method).max_steps):
        raise InputError(f"method {method!r} trains at most {most} steps, not {steps}.")


def converge(method: str, teacher: GaussianMixture, **run: Any) -> Convergence:
    """Fit a small net to the exact teacher, distil it by `method` for the rest of `seconds`, and measure.

    run: any of `prediction`, "x0", of the small net, on the teacher's path; `student_steps`, 1 unless recipes/exact
    says otherwise; `seconds`, 60; `seed`, 0; `reward`, for the methods that need one, by default one that is constant
    on the truth (see `inside`); and settings as in `distill` (trainer settings and options of the method), over those
    of recipes/exact. With lora_rank, lora_targets are layers of `Net`. The noise between steps is the method's own. A
    fifth of the time goes to the fit; with `steps`, both parts end after that many rounds, so that the result does not
    depend on the machine's speed.
    Raises InputError for an unknown method or setting.
    """
    return measure(distil(method, teacher, **run))


def ring(path: Path, modes: int = 8, radius: float = 1.0, std: float = 0.1, labelled: bool = True) -> GaussianMixture:
    """The ring of Gaussians: `modes` components of deviation `std` on a circle, each its own class, or all of one."""
    angle = torch.arange(modes) * (2 * torch.pi / modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(path, means, std, labels=torch.arange(modes) if labelled else None)


def mixture(path: Path) -> GaussianMixture:
    """Three anisotropic Gaussians in 8 dimensions, each its own class."""
    generator = torch.Generator().manual_seed(8)
    means = torch.randn(3, 8, generator=generator)
    return GaussianMixture(path, means, 0.1 + 0.4 * torch.rand(3, 8, generator=generator), labels=torch.arange(3))


class Case(NamedTuple):
    """An exact teacher, what the small network predicts on its path, and the largest sliced-W2 over the floor."""

    teacher: Callable[[], GaussianMixture]
    prediction: Prediction
    limit: float


CASES: dict[str, Case] = {
    "ring, EDM, x0": Case(lambda: ring(EDM()), "x0", 5),
    "ring, VP, v": Case(lambda: ring(VP()), "v", 5),
    "ring, flow": Case(lambda: ring(Flow()), "flow", 5),
    "ring, VP, eps": Case(lambda: ring(VP()), "eps", 12),
    "mixture, EDM, x0": Case(lambda: mixture(EDM()), "x0", 5),
}
"""What `make truth` measures every method on. On VP, eps prediction amplifies errors 15-fold at the noise end."""


def limit(method: str, case: str) -> float:
    """The largest sliced-W2 over the floor with which a method passes: one less than the case's for a trajectory."""
    return CASES[case].limit - _learns_trajectories(method)


def gain(method: str, case: str) -> float:
    """How many times nearer than the start a method must come to pass: 5, or 1 for a trajectory or a wide limit."""
    return 1 if _learns_trajectories(method) or CASES[case].limit > 5 else 5


def _learns_trajectories(method: str) -> bool:
    return METHODS[method].split(".")[-2] in ("consistency", "flow", "guidance")


def student_of(method: str, case: str, seconds: float, seed: int, student_steps: int | None = None) -> Distilled:
    """`distil` on one of CASES. Raises InputError for a case or method that does not exist."""
    if case not in CASES:
        raise unknown("case", case, CASES)
    teacher, prediction, _ = CASES[case]
    return distil(method, teacher(), prediction=prediction, student_steps=student_steps, seconds=seconds, seed=seed)


def check(method: str, case: str, seconds: float = 90, seed: int = 0) -> Convergence:
    """`converge` on one of CASES. Raises InputError for a case or method that does not exist."""
    return measure(student_of(method, case, seconds, seed))

"""How a teacher draws: solvers of the probability-flow ODE, for any denoiser on any path.

The solvers are diffusers' schedulers, each set to exactly our noise levels; ours are only those it lacks or has wrong.
A scheduler's states differ from the path's x_t by a factor that its noise level fixes, so matching is exact.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from onestroke.errors import InputError, unknown
from onestroke.paths import Cond, Estimate, Path, like
from onestroke.times import RAMP, strides

NOISIEST = 4096.0
"""The largest noise level b / a that a solver starts from: log(b / a) must be finite. diffusers' own limit."""


def noisiest(path: Path) -> float:
    """The time at which the noise level is NOISIEST, which some paths do not reach."""
    return path.time_of(torch.tensor(-math.log(NOISIEST), dtype=torch.float64)).item()


class Run(NamedTuple):
    """A scheduler set for one trajectory."""

    step: Callable[[Tensor, Tensor, int], Tensor]  # (eps or eps - x0, state, number of the call) -> the next state
    calls: Sequence[int]  # the number of the time at which each call reads the network


@dataclass(frozen=True)
class Solver:
    """Space: of its states, "vp" a^2 + b^2 = 1, "ve" a = 1 or "flow" a + b = 1. start: noise levels (N + 1,) -> Run."""

    space: Literal["vp", "ve", "flow"]
    start: Callable[[Tensor, Tensor, Path], Run]  # (levels b / a, times, path), float64


def trajectory(net: nn.Module, path: Path, x: Tensor, times: Sequence[float], cond: Cond, solver: str) -> list[Tensor]:
    """The states x_t (B, *D) at all of `times` (decreasing, noise level positive), from x at the first.

    net: a denoiser on `path`, which is read at noise levels up to NOISIEST. Raises InputError for an unknown solver.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    space, start = SOLVERS[solver].space, SOLVERS[solver].start
    t = torch.tensor(times, dtype=torch.float64).clamp_max(noisiest(path))
    if len(t) < 2:
        return [x]
    a, b = path.ab(t)
    scale = {"vp": torch.hypot(a, b), "ve": a, "flow": a + b}[space]
    run = start(b / a, t, path)
    states, state = [x] * len(t), x / like(scale[:1], x)
    for k, i in enumerate(run.calls):
        est = net(state * scale[i].to(x), t[i].to(x.device, torch.float64).expand(len(x)), cond)
        state = run.step(est.eps - est.x0 if space == "flow" else est.eps, state, k)
        reached = run.calls[k + 1] if k + 1 < len(run.calls) else len(t) - 1
        states[reached] = state * scale[reached].to(x)
    return states


@torch.no_grad()
def solve(net: nn.Module, path: Path, noise: Tensor, cond: Cond, steps: int = 25, solver: str = "dpm++2m") -> Tensor:
    """What `net`, a denoiser on `path`, makes of standard-normal noise (B, *D) under cond: x0 (B, *D).

    steps: of `levels`, at each of which the network is called (once, or twice by the Heun solvers but for the last);
    at the last its x0 is the answer. Raises InputError for no steps or an unknown solver.
    """
    times = levels(path, steps)
    x = trajectory(net, path, scaled(path, noise, times[0]), times, cond, solver)[-1]
    return net(x, torch.full((len(x),), times[-1], dtype=torch.float64, device=x.device), cond).x0


def scaled(path: Path, noise: Tensor, t: float) -> Tensor:
    """Standard-normal noise (B, *D) as a state at t: of the deviation of noised unit-variance data."""
    a, b = path.ab(torch.tensor([t], dtype=torch.float64))
    return noise * like(torch.hypot(a, b), noise)


def levels(path: Path, steps: int) -> list[float]:
    """The times (decreasing) at which b / a is equally spaced on the ramp of Karras et al. (arXiv 2206.00364).

    The first is where the path ends, the last where it begins. Not snapped: near the data the ramp is finer than a
    teacher's table.
    """
    if steps < 1:
        raise InputError(f"a solver needs at least 1 step, not {steps}.")
    first = min(path.t_max, noisiest(path))
    ends = RAMP.time_of(path.log_snr(torch.tensor([first, path.t_min], dtype=torch.float64))).clamp_max(1.0)
    ramp = path.time_of(RAMP.log_snr(torch.linspace(ends[0], ends[1], steps, dtype=torch.float64)))
    return [first, *ramp[1:-1].tolist(), path.t_min][:steps]


# ---- single steps, every row between times of its own --------------------------------------------------------


def euler(net: nn.Module, path: Path, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """x_s (B, *D) from x at t (B,) to s (B,) by one call of `net`: the DDIM step."""
    est = net(x, t, cond)
    return path.mix(est.x0, est.eps, s)


def heun(net: nn.Module, path: Path, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """As `euler`, by the trapezoid rule over b / a, two calls (arXiv 2206.00364, algorithm 1).

    From noise levels beyond the ramp's end, which may be infinite, the step is Euler's.
    """
    est = net(x, t, cond)
    end = path.mix(est.x0, est.eps, s)
    (a, b), rho = path.ab(s), (-path.log_snr(t)).exp()
    gap = torch.where(rho > 1.001 * RAMP.sigma_max, 0.0, b / a - rho)
    return end + like(a * gap / 2, x) * (net(end, s, cond).eps - est.eps)


def jump(net: nn.Module, path: Path, x: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
    """As `euler`, for rows that may have arrived: where t = s it is x itself, whatever `net` says."""
    there = euler(net, path, x, t.clamp_min(path.t_min), s, cond)
    return torch.where(like(t - s, x) > 0, there, x)


STEPS: dict[str, Callable[[nn.Module, Path, Tensor, Tensor, Tensor, Cond], Tensor]] = {"euler": euler, "heun": heun}
"""By name: (net, path, x, t, s, cond) -> x_s."""


# ---- ways: all states of a solution --------------------------------------------------------------------------


def stops(path: Path, steps: int) -> Tensor:
    """The times of the states of a way of `steps` DDIM steps, (steps + 1,), decreasing float64; the last, 0, is the
    picture's. They are those of a teacher's own scheduler, and among them are a student's of a divisor of the steps.

    Raises InputError where a teacher's table has no such grid.
    """
    return strides(path, steps).flip(0)


@torch.no_grad()
def way(net: nn.Module, path: Path, noise: Tensor, cond: Cond, steps: int) -> Tensor:
    """The states (B, steps + 1, *D) at `stops` on the DDIM way of `net` from standard-normal noise (B, *D) under cond.

    On the straight path these are Euler's steps. The first is the student's input, the last the picture x0.
    """
    times = stops(path, steps).to(noise.device)
    states = [scaled(path, noise, times[0].item())]
    for t, s in pairwise(times):
        est = net(states[-1], t.expand(len(noise)), cond)
        states.append(path.mix(est.x0, est.eps, s.expand(len(noise))) if s > 0 else est.x0)
    return torch.stack(states, 1)


def chord(path: Path, states: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Estimate]:
    """Of ways (B, K + 1, *D): the states x (B, *D) number i (B,), their times (B,), and the (x0, eps) at x whose single
    DDIM step ends in the states number j > i. At j = i + 1 these are what the solved network said at x."""
    times, rows = stops(path, states.shape[1] - 1).to(states.device), torch.arange(len(states), device=states.device)
    x, y, t, s = states[rows, i], states[rows, j], times[i], times[j]
    x0 = torch.where(like(s > 0, x) > 0, path.through(x, t, y, s).x0, y)  # whatever noise the path has at the data end
    return x, t, path.split(x, x0, t, "x0")


# ---- diffusers' schedulers -----------------------------------------------------------------------------------


def _scheduler(name: str, **config: Any) -> Any:
    return getattr(importlib.import_module("diffusers"), name)(**config)


def _play(scheduler: Any, timesteps: Tensor, calls: Sequence[int]) -> Run:
    return Run(lambda out, x, k: scheduler.step(out, timesteps[k], x, return_dict=False)[0], calls)


def _by_levels(name: str, make: Callable[..., Any] = _scheduler, **config: Any) -> Callable[..., Run]:
    """A scheduler that reads `sigmas`: b / a, or b / (a + b) where it is one of flows; Heun's read inner ones twice."""

    def start(rho: Tensor, times: Tensor, path: Path) -> Run:
        n = len(rho) - 1
        scheduler = make(name, **config)
        scheduler.set_timesteps(max(n, 2))
        sigmas, calls = rho / (1 + rho) if name.startswith("FlowMatch") else rho, list(range(n))
        if "Heun" in name:
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
            calls = [(k + 1) // 2 for k in range(2 * n)]
        scheduler.sigmas, scheduler.num_inference_steps = sigmas, n
        scheduler.timesteps = torch.arange(len(calls), 0, -1, dtype=torch.float32)
        scheduler.set_begin_index(0)
        scheduler.is_scale_input_called = True  # trajectory() scales
        return _play(scheduler, scheduler.timesteps, calls)

    return start


def _by_table(name: str, **config: Any) -> Callable[..., Run]:
    """A scheduler that reads `alphas_cumprod` at whole indices: it gets a table of exactly our noise levels."""

    def start(rho: Tensor, times: Tensor, path: Path) -> Run:
        n = len(rho) - 1
        scheduler = _scheduler(name, num_train_timesteps=n + 1, timestep_spacing="linspace", **config)
        scheduler.set_timesteps(n + 1)
        scheduler.alphas_cumprod = 1 / (1 + rho.flip(0).square())
        timesteps = scheduler.timesteps[:-1]
        return _play(scheduler, timesteps, (n - timesteps).tolist())

    return start


def _third_order(name: str, **config: Any) -> Any:
    """DPM-Solver++(3M) with the factor 2 of its last term, without which it is of second order (measured)."""
    base: Any = getattr(importlib.import_module("diffusers"), name)

    class ThirdOrder(base):
        def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, noise=None, **kwargs):
            x = super().multistep_dpm_solver_third_order_update(
                model_output_list, *args, sample=sample, noise=noise, **kwargs
            )
            rho = self.sigmas[self.step_index - 2 : self.step_index + 2]
            h1, h0, h = (rho[:-1] / rho[1:]).log()
            m2, m1, m0 = model_output_list[-3:]
            curvature = ((m0 - m1) * (h / h0) - (m1 - m2) * (h / h1)) * (h / (h0 + h1))
            return x - ((torch.expm1(-h) + h) / h**2 - 0.5) / torch.hypot(rho[-1], torch.ones(())) * curvature

    return ThirdOrder(**config)


# ---- ours ----------------------------------------------------------------------------------------------------


def _tab_deis(order: int) -> Callable[..., Run]:
    """DEIS tAB of any order (arXiv 2204.13902): eps as a polynomial of the path's own time, integrated over b / a.

    diffusers has the polynomial of log(b / a) alone.
    """
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(20))

    def start(rho: Tensor, times: Tensor, path: Path) -> Run:
        past: list[Tensor] = []

        def step(eps: Tensor, x: Tensor, k: int) -> Tensor:
            past.insert(0, eps)
            del past[order:]
            middle, half = (rho[k].log() + rho[k + 1].log()) / 2, (rho[k + 1].log() - rho[k].log()) / 2
            level = middle + half * points
            t, knots = path.time_of(-level), [times[k - j] for j in range(len(past))]
            measure = half * weights * level.exp()  # d rho
            for j, (knot, old) in enumerate(zip(knots, past, strict=True)):
                basis = [(t - other) / (knot - other) for i, other in enumerate(knots) if i != j]
                x = x + (measure * math.prod(basis)).sum().to(x) * old
            return x

        return Run(step, range(len(rho) - 1))

    return start


_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "sigma_min"}
SOLVERS: dict[str, Solver] = {
    "ddim": Solver("vp", _by_table("DDIMScheduler", clip_sample=False)),
    "pndm": Solver("vp", _by_table("PNDMScheduler", skip_prk_steps=True)),
    "dpm++2m": Solver("vp", _by_levels("DPMSolverMultistepScheduler", solver_order=2, **_DPM)),
    "dpm++3m": Solver("vp", _by_levels("DPMSolverMultistepScheduler", _third_order, solver_order=3, **_DPM)),
    "dpm++2s": Solver("vp", _by_levels("DPMSolverSinglestepScheduler", solver_order=2, **_DPM)),
    "dpm++3s": Solver("vp", _by_levels("DPMSolverSinglestepScheduler", solver_order=3, **_DPM)),
    "deis": Solver("vp", _by_levels("DEISMultistepScheduler", solver_order=3)),
    "deis-tab2": Solver("ve", _tab_deis(2)),
    "deis-tab3": Solver("ve", _tab_deis(3)),
    "unipc": Solver("vp", _by_levels("UniPCMultistepScheduler", solver_order=2, lower_order_final=False)),
    "unipc3": Solver("vp", _by_levels("UniPCMultistepScheduler", solver_order=3, lower_order_final=False)),
    "euler": Solver("ve", _by_levels("EulerDiscreteScheduler")),
    "heun": Solver("ve", _by_levels("HeunDiscreteScheduler")),
    "flow-euler": Solver("flow", _by_levels("FlowMatchEulerDiscreteScheduler")),
    "flow-heun": Solver("flow", _by_levels("FlowMatchHeunDiscreteScheduler")),
}
"""By name. Their orders are measured by the tests: 1 for DDIM and Euler, 2 or more for all others. Those of single
steps, 2s and 3s, read the network at two and three times in turn and take one step over them."""

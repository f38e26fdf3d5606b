"""A distillation method is a generator of turns; the kernel of the training loop plays it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from onestroke.denoiser import Denoiser, Guided, Told, tap
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.heads import Critic, Head, Heads, Pool, feature_channels
from onestroke.paths import Cond, Path
from onestroke.sampling import FewStep


class Pairs(NamedTuple):
    """Noise and what the teacher's solver makes of it under the same condition (DMD's regression set, reflow)."""

    noise: Tensor  # (B, *D), standard normal
    x0: Tensor  # (B, *D)


class Batch(NamedTuple):
    """What a step sees."""

    noise: Tensor  # (B, *D), standard normal
    cond: Cond
    draw: Draws  # every other random number of the step
    x0: Tensor | None = None  # (B, *D) real latents, for the methods that need them
    pairs: Pairs | None = None  # of the teacher's solver, for the methods that need them
    ways: Tensor | None = None  # (B, K + 1, *D) states of the teacher's DDIM way (see `solvers.way`), likewise
    side: Tensor | None = None  # (B,) where the guidance of a pair or way lies in its range (see `denoiser.sides`)


class Reward(Protocol):
    """What a picture is worth: differentiable, larger is better."""

    def __call__(self, x0: Tensor, cond: Cond) -> Tensor:
        """Latents x0 (B, *D) under cond -> (B,)."""


class Turn(NamedTuple):
    """One optimiser step of one player, on the sum of the named scalar terms.

    fresh: parameters of the player, by name, that begin anew after that step: the values given, and nothing of them in
    the optimiser's memory. The same in every micro-batch and process.
    follow: targets, by name, that follow the player after that step, and how much each keeps of itself.
    """

    player: str
    terms: dict[str, Tensor]
    fresh: Mapping[str, Tensor] = {}
    follow: Mapping[str, float] = {}


class Mean(NamedTuple):
    """A question to the whole batch: `yield Mean(v)` is the mean of v over all micro-batches and processes.

    v is a mean or a sum over this micro-batch, of any shape, taken without gradient. Ask before the calls that are
    differentiated: all micro-batches wait for the answer, a graph would wait with each, and DDP allows but one.
    """

    value: Tensor


Game = Generator[Turn | Mean, Tensor | None, None]
"""One round of one micro-batch."""


@dataclass(frozen=True)
class Parts:
    """What a method is built from. `teacher` is frozen; `student` and each `copy(role)` start at its weights.

    A run may ask for a student with fewer layers (`Settings.layers`); copies have all of them.
    """

    teacher: Denoiser
    student: Denoiser
    copy: Callable[[str], nn.Module]
    few: FewStep
    null: Cond  # the unconditional condition, leading dimension 1
    guidance_scale: float = 1.0
    shape: tuple[int, ...] = ()  # of one latent
    reward: Reward | None = None
    rounds: int = 1000  # of the whole run, for what changes along it
    encode: Callable[[list[str]], Cond] | None = None  # prompts (N) -> conditions (N, ...), where a teacher reads any
    conditions: Cond | None = None  # (N, ...), all that the run learns under
    solver_steps: int = 25  # of the teacher's solver: K of the ways

    @property
    def path(self) -> Path:
        return self.few.path

    def check_implied(self) -> None:
        """Refuse other noise between several calls than the student's own estimate. Raises InputError."""
        if len(self.few.times) > 1 and self.few.renoise != "implied":
            raise InputError(f"a student of DDIM steps needs renoise=implied, not {self.few.renoise!r}.")

    def prompts(self, texts: list[str]) -> Cond:
        """The conditions (N, ...) of prompts; "" is the null condition.

        Raises InputError where the teacher reads none, or one is longer than all of the run's.
        """
        if any(texts) and self.encode is None:
            raise InputError(f"this teacher reads no prompts, so it cannot encode {texts}.")
        rows = [dict(self.encode([text])) if text and self.encode else self.null for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if any(row[k].shape != v.shape for k, v in self.null.items()):
                raise InputError(f"the prompt {text!r} is longer than all prompts of the run; put it among them.")
        return {k: torch.cat([row[k].to(v.device) for row in rows]) for k, v in self.null.items()}

    def heads(self) -> Heads:
        """Fresh discriminator heads for every tapped layer of the teacher."""
        return Heads(self._channels(self.teacher)).to(self._kind)

    def pool(self, count: int) -> Pool:
        """`count` fresh discriminator heads for every tapped layer of the teacher, of which a call uses one each."""
        return Pool(self._channels(self.teacher), count).to(self._kind)

    def critic(self, role: str) -> Critic:
        """`copy(role)` with a fresh discriminator head on its bottleneck, one player."""
        net = self.copy(role)
        head = Head(self._channels(net)[self.bottleneck])
        return Critic(net, head.to(self._kind), self.bottleneck)

    @property
    def bottleneck(self) -> int:
        """Which of the tapped features of the teacher and its copies is the narrowest layer's."""
        return self.teacher.bottleneck

    @property
    def _kind(self) -> torch.dtype:
        """The type of the network's weights, which its heads share."""
        return next((p.dtype for p in self.student.parameters() if p.is_floating_point()), torch.float32)

    def _channels(self, net: nn.Module) -> list[int]:
        """Of the features of `net`, which gives them from now on."""
        return feature_channels(tap(net), self.shape, self.null)

    def target(self, student: nn.Module | None = None) -> nn.Module:
        """A frozen copy of what the student trains, over what it shares with the teacher; `follow` moves it.

        student: what a method made of the student, if it plays that instead.
        """
        student = self.student if student is None else student
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        return copy.deepcopy(student, shared).requires_grad_(False)

    def guide(self, net: nn.Module, scale: float | Tensor | None = None) -> nn.Module:
        """`net` under classifier-free guidance of this scale, one or one per row, or of this run's where it is None."""
        return Guided(net, self.guidance_scale if scale is None else scale, self.null)


NEEDS = {
    "x0": "real images with captions",
    "pairs": "noise and pictures of the teacher's solver",
    "ways": "all states of the teacher's solver on its way from noise to picture",
    "sides": "those under a guidance of their own each, as far around the run's as the option spread says",
    "reward": "a differentiable reward",
    "features": "a teacher whose layers can be tapped",
    "steering": "attention that can be steered away from a second text",
    "branch": "a negative-prompt branch where the network has cross-attention",
    "halves": "a teacher with a UNet, whose encoder and decoder can be run apart",
    "times": "where a student has several steps, a pipeline whose call takes their times",
}
"""What a method may need beside prompts, in words."""


class Method(nn.Module, ABC):
    """A distillation algorithm: named players and a generator of turns.

    The class attributes are claims; the contract tests check them. Options are the keyword arguments of __init__.

    What a method remembers from round to round is a buffer of its own: checkpoints keep it.

    Seven rules. (1) One generator: no optimiser, backward, device, rank or logging in it. (2) A player is called only
    as self.<player>(...), never a submodule of it. (3) To differentiate through a module without training it: `with
    frozen(m):`, the yield inside. (4) Control flow depends on `step` and `batch.draw.shared()` only; random numbers
    come from `batch.draw` only. (5) After a yield the weights have moved. (6) Hyper-parameters are keyword arguments
    with the paper's default. (7) `players`, `needs` and `passes` are true.
    """

    players: tuple[str, ...]
    """Attributes that are trained, in the order of play; an instance whose options need no more may have fewer."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Attributes that follow the student without training (see `follow`); they are saved and resumed."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of NEEDS, with the default options; empty: prompts alone."""
    needs_if: ClassVar[Mapping[str, str]] = {}
    """Of NEEDS, by the option: what is needed unless that option is 0, and only then."""
    paper: ClassVar[str]
    """Title and arXiv id."""
    passes: ClassVar[Mapping[str, int]]
    """Network calls of one batch per round, by role, with guidance on (a guided call counts two); of a method in phases
    in that which makes the most."""
    max_steps: ClassVar[int] = 1
    """The largest number of calls of the student that the method can train."""
    target: ClassVar[Literal["law", "modes", "guided", "guided steps"]] = "law"
    """What the student's samples become: samples of the teacher's law, or its modes alone; or, of a method that distils
    guidance, what the guided teacher draws in many steps, or in as many as the student."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Run settings of the paper, or ours where the docstring says so, where they differ from the trainer's."""
    guidance: Told | None = None
    """Which guidance the student, a `TwoTimes`, is told, if it is; an instance says its own."""
    phases: tuple[int, ...] = ()
    """Rounds after the first from which on a round does something else: other calls, turns or networks, not other
    numbers alone. `plan` plays them, and a run that is over before the last is refused. An instance says its own."""

    @abstractmethod
    def __init__(self, parts: Parts):
        super().__init__()

    @classmethod
    def needs_of(cls, options: Mapping[str, Any]) -> frozenset[str]:
        """What a run with these options, all of them, needs. Raises InputError where they contradict each other."""
        asked = {need for option, need in cls.needs_if.items() if options[option]}
        return cls.needs - set(cls.needs_if.values()) | asked

    @abstractmethod
    def step(self, batch: Batch, step: int) -> Game:
        """One round. The weights HAVE moved when the generator resumes after the yield of a Turn."""


_scope: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> how many frozen() blocks of this game hold it


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Use modules as functions of their inputs. Keep the yield of the Turn inside: backward must see it too.

    Blocks are counted, so that they nest, and belong to the game they are opened in (see `playing`).
    """
    scope = _scope
    params = [p for m in modules for p in m.parameters() if p.requires_grad or p in scope]
    for p in params:
        scope[p] = scope.get(p, 0) + 1
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            scope[p] -= 1
            if not scope[p]:
                del scope[p]
                p.requires_grad_(True)


@torch.no_grad()
def follow(target: nn.Module, player: nn.Module, keep: float = 0.0) -> None:
    """target <- keep target + (1 - keep) player, whatever distributes the player. Call it where the weights moved.

    A game calls it with keep = 0 alone: every micro-batch does. An average is asked for by Turn.follow, once per round.
    """
    for old, new in zip(target.parameters(), player.parameters(), strict=True):
        if old is not new:
            old.lerp_((new.full_tensor() if isinstance(new, DTensor) else new).to(old), 1 - keep)


@contextmanager
def playing(scope: WeakIdKeyDictionary) -> Iterator[None]:
    """One game's turn and its backward: what it holds frozen is frozen here, and only here.

    With gradient accumulation several games wait inside their blocks at once; none may freeze another's next turn.
    """
    global _scope
    outer, _scope = _scope, scope
    for p in scope:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in scope:
            p.requires_grad_(True)
        _scope = outer


def advance(game: Game, answer: Tensor | None = None) -> Turn | Mean | None:
    """What the game yields next, given the answer to its last question; None at its end."""
    try:
        return game.send(answer)
    except StopIteration:
        return None


def play(
    method: Method,
    batches: Sequence[Batch],
    step: int,
    update: Callable[[str], None],
    backward: Callable[[Tensor], None] = Tensor.backward,
    advance: Callable[[Game, Tensor | None], Turn | Mean | None] = advance,
    renew: Callable[[str, Mapping[str, Tensor]], None] | None = None,
    share: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, Tensor]:
    """One round: play the micro-batches' generators in lock-step, so that every turn accumulates gradient.

    Calls `update(player)` once per turn, after the backward of all micro-batches, and `renew(player, fresh)` after it
    where the turn asks for it; without `renew` the values alone are set. Then the turn's targets follow. `share(value)`
    is the mean of a value over the processes. Returns the mean of every term as "player/term", detached.
    """
    games = [method.step(batch, step) for batch in batches]
    scopes = [WeakIdKeyDictionary() for _ in games]
    log: dict[str, Tensor] = {}
    answer: Tensor | None = None
    while True:
        turns, questions = [], []
        for game, scope in zip(games, scopes, strict=True):
            with playing(scope):
                found = advance(game, answer)
                if isinstance(found, Mean):
                    questions.append(found.value.detach())
                elif found is not None:
                    backward(torch.stack(list(found.terms.values())).sum() / len(games))
                    turns.append(found)
        answer = share(torch.stack(questions).mean(0)) if questions else None
        if questions:
            continue
        if not turns:
            return log
        (player,) = {turn.player for turn in turns}
        update(player)
        if fresh := turns[0].fresh:
            if renew is None:
                getattr(method, player).load_state_dict(fresh, strict=False)
            else:
                renew(player, fresh)
        for target, keep in turns[0].follow.items():
            follow(getattr(method, target), getattr(method, player), keep)
        for name in turns[0].terms:
            log[f"{player}/{name}"] = torch.stack([turn.terms[name].detach() for turn in turns]).mean()

"""Idle roles lie in main memory: a role comes to the device for its turn, an optimiser's state for its step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def main_memory(tensor: Tensor) -> Tensor:
    """A copy in main memory that the device can read quickly."""
    return torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available()).copy_(tensor)


class Offload:
    """Groups of tensors, by name, that lie at home and are on the device while someone holds them.

    A tensor may be in several groups, as the weights that roles share are: it is there once, while any of them is held.
    home: makes a tensor's copy where it lies. Without one nothing is ever moved. moves: how often a tensor came.
    """

    def __init__(self, device: torch.device, home: Callable[[Tensor], Tensor] | None = None):
        self.device, self.home, self.moves = device, home, 0
        self.groups: dict[str, list[Tensor]] = {}
        self.trained: set[int] = set()
        self.homes: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}
        self.holders: Counter[int] = Counter()
        self.kept: list[str] = []
        self.handles: list[Any] = []

    def add(self, name: str, tensors: Iterable[Tensor], trained: bool = True) -> None:
        """Send tensors home as a group. trained: written to on the device in ways that torch may not count."""
        if self.home is None:
            return
        self.groups[name] = list({id(t): t for t in tensors}.values())
        for t in self.groups[name]:
            if id(t) not in self.homes:
                self.homes[id(t)] = t.data = self.home(t.data)
            if trained:
                self.trained.add(id(t))

    def watch(self, name: str, module: nn.Module, trained: bool) -> None:
        """Hold a role's tensors while it is called, and to the end of the turn where the call is differentiated."""
        if self.home is None:
            return
        self.add(name, (*module.parameters(), *module.buffers()), trained)

        def enter(module: nn.Module, args: Any) -> None:
            self.fetch(name)
            if torch.is_grad_enabled() and name not in self.kept:
                self.kept.append(name)
                self.fetch(name)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.drop(name)

        self.handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]

    def turn_ends(self) -> None:
        """Let those go that were kept for a backward pass."""
        while self.kept:
            self.drop(self.kept.pop())

    @contextmanager
    def here(self, *names: str) -> Iterator[None]:
        """Hold these groups."""
        for name in names:
            self.fetch(name)
        try:
            yield
        finally:
            for name in names:
                self.drop(name)

    def idle(self, tensor: Tensor) -> bool:
        """Whether nobody holds a tensor of a group."""
        return id(tensor) in self.homes and not self.holders[id(tensor)]

    def fetch(self, name: str) -> None:
        for t in self.groups.get(name, ()):
            if self.idle(t):
                with torch._C._DisableFuncTorch():  # a role may be called inside a transform
                    t.data = torch.empty_like(t.data, device=self.device).copy_(t.data)
                self.versions[id(t)] = t._version
                self.moves += 1
            self.holders[id(t)] += 1

    def drop(self, name: str) -> None:
        for t in self.groups.get(name, ()):
            self.holders[id(t)] -= 1
            if self.idle(t):
                home = self.homes[id(t)]
                with torch._C._DisableFuncTorch():
                    if id(t) in self.trained or t._version != self.versions[id(t)]:
                        home.copy_(t.data)
                    t.data = home

    def end(self, name: str) -> None:
        """Leave this group on the device for good, and watch no more."""
        self.turn_ends()
        self.fetch(name)
        for handle in self.handles:
            handle.remove()

"""Discriminators: small heads over the features of a denoiser, and the denoiser that carries one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from onestroke.paths import Cond, Estimate


class Head(nn.Module):
    """Logits (B, N) from one feature (B, C, ...): one logit per place. Two 1x1 layers over normalised channels.

    Places are the pixels of a feature map (B, C, H, W), the tokens of (B, C, L), or the one place of (B, C).
    """

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        # No last bias: inside the margins of the hinge its gradient is rounding alone, which Adam makes full steps of.
        self.body = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 1, bias=False))

    def forward(self, feature: Tensor) -> Tensor:
        places = feature.flatten(2).transpose(1, 2) if feature.ndim > 2 else feature[:, None]
        return self.body(self.norm(places.to(self.norm.weight))).squeeze(-1)


class Heads(nn.Module):
    """Logits (B, N) from all tapped features, those of every layer side by side (LADD, arXiv 2403.12015)."""

    def __init__(self, channels: Sequence[int], width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(Head(c, width) for c in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(f) for head, f in zip(self.heads, features, strict=True)], 1)


class Pool(nn.Module):
    """`count` heads for every tapped feature; a call uses one per feature (NitroFusion, arXiv 2412.02030).

    The others stay out of the graph, so that their weights and their optimiser's memory rest: the pool is `sparse`.
    """

    sparse = True

    def __init__(self, channels: Sequence[int], count: int, width: int = 64):
        super().__init__()
        self.channels, self.width = tuple(channels), width
        self.heads = nn.ModuleList(Head(c, width) for _ in range(count) for c in channels)

    @property
    def layers(self) -> int:
        return len(self.channels)

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, features: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Logits (B, N): feature i is judged by number rows[i] of the heads for it."""
        heads = [self.heads[row * self.layers + i] for i, row in enumerate(rows)]
        return torch.cat([head(f) for head, f in zip(heads, features, strict=True)], 1)

    def fresh(self, head: int, share: float) -> dict[str, Tensor]:
        """Weights of a new head in place of number `head` of all, by name; `share` in [0, 1) chooses them."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(share * 2**32))  # of a seed it reads 32 bits
            new = Head(self.channels[head % self.layers], self.width)
        return {f"heads.{head}.{name}": value for name, value in new.state_dict().items()}


class Critic(nn.Module):
    """A denoiser with a head on its bottleneck: `features` of its estimate is the logit (B, N) alone.

    The fake score and the discriminator of DMD2 (arXiv 2405.14867, section 4.3) are this one network.
    """

    def __init__(self, net: nn.Module, head: Head, bottleneck: int):
        super().__init__()
        self.net, self.head, self.bottleneck = net, head, bottleneck

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Estimate:
        est = self.net(x, t, cond)
        return est._replace(features=(self.head(est.features[self.bottleneck]),))


def feature_channels(net: nn.Module, shape: tuple[int, ...], null: Cond) -> list[int]:
    """The channels of the features of `net`, from one call on zeros of shape (1, *shape)."""
    p = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    cond = {k: v.to(p.device) for k, v in null.items()}
    x, t = torch.zeros((1, *shape), device=p.device, dtype=p.dtype), torch.full((1,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        return [f.shape[1] for f in net(x, t.to(p.device), cond).features]

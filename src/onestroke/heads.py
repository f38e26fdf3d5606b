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
        self.body = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, 1))

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

"""Stage 1: the autoencoder, 64x64x3 -> 8x8x16 (AutoencoderTiny, 1.9 M parameters), by squared and absolute error.

The absolute error keeps the flat areas of the artwork flat. `--start PIPELINE` continues the decoder of a saved
pipeline alone; its encoder, and so every denoiser trained on its latents, stays as it is. It then learns to decode
what denoisers and students draw: pictures in any pose, from latents whose noise is anything between none and ROUGH.

The latent is normalised per channel while training (batch statistics, plus a little noise so that the decoder
tolerates a denoiser's errors); the statistics are then folded into the encoder's last convolution, so that the saved
autoencoder has unit-variance latents and scaling_factor 1.

    python recipes/emoji64/autoencoder.py --data DATA --work WORK
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import arguments, load_data, posed, to_float, train
from diffusers import AutoencoderTiny
from torch import Tensor, nn

NOISE, ROUGH, ABSOLUTE = 0.05, 0.3, 0.1


class Autoencoder(nn.Module):
    def __init__(self, width: int = 64, channels: int = 16):
        super().__init__()
        self.vae = AutoencoderTiny(
            encoder_block_out_channels=(width,) * 4,
            decoder_block_out_channels=(width,) * 4,
            num_encoder_blocks=(0, 1, 3, 3),
            num_decoder_blocks=(3, 3, 2, 0),
            latent_channels=channels,
            scaling_factor=1.0,
        )
        self.norm: nn.Module = nn.BatchNorm2d(channels, affine=False, momentum=0.01)

    @property
    def folded(self) -> bool:
        return isinstance(self.norm, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.vae.encoder(x).float())
        if self.training:
            scale = ROUGH * torch.rand(len(z), 1, 1, 1, device=z.device) if self.folded else NOISE
            z = z + scale * torch.randn_like(z)
        return self.vae.decoder(z)

    @torch.no_grad()
    def fold(self) -> AutoencoderTiny:
        """The autoencoder with the latent's statistics inside its last encoder convolution."""
        if self.folded:
            return self.vae
        last, scale = self.vae.encoder.layers[-1], (self.norm.running_var + self.norm.eps).rsqrt()
        last.weight.mul_(scale[:, None, None, None])
        last.bias.sub_(self.norm.running_mean).mul_(scale)
        return self.vae


def augmented(images: Tensor) -> Tensor:
    """A random flip and a random shift of up to 6 pixels over the white ground."""
    if torch.rand(()) < 0.5:
        images = images.flip(3)
    dy, dx = torch.randint(0, 13, (2,)).tolist()
    return F.pad(images, (6, 6, 6, 6), value=1.0)[:, :, dy : dy + 64, dx : dx + 64]


def psnr(net: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        errors = [(net(x).clamp(-1, 1) - x).square().flatten(1).mean(1) / 4 for x in images.split(128)]
    return (-10 * torch.cat(errors).mean().log10()).item()


def main() -> None:
    args = arguments(__doc__, steps=7_500, batch=16, lr=4e-3)
    images, _, out = load_data(args.data)
    seen, unseen = to_float(images[~out]).to(args.device), to_float(images[out]).to(args.device)
    net = Autoencoder()
    if args.start:
        net.vae = AutoencoderTiny.from_pretrained(args.start, subfolder="vae")
        net.vae.encoder.requires_grad_(False)
        net.norm = nn.Identity()
    net = net.to(args.device).to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        x = augmented(seen[torch.randint(len(seen), (args.batch,))])
        if net.folded:
            x = torch.cat([x[: args.batch // 2], posed(x[args.batch // 2 :])])
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16):
            y = net(x)
        return F.mse_loss(y.float(), x) + ABSOLUTE * F.l1_loss(y.float(), x)

    def report():
        yield f"held-out PSNR {psnr(net, unseen):.2f} dB, seen {psnr(net, seen[:512]):.2f} dB"

    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    train(net, loss, args.work / "autoencoder.safetensors", steps=args.steps, lr=args.lr, report=report)
    net.fold().save_pretrained(args.work / "vae")
    print(*report())


if __name__ == "__main__":
    main()

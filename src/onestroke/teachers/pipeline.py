"""Teachers that are diffusers pipelines: the Stable Diffusion UNet family with a CLIP text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onestroke.denoiser import Denoiser, tapped
from onestroke.errors import InputError, read_json
from onestroke.paths import Cond, Prediction, Table
from onestroke.sampling import FewStep

PREDICTION: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SUPPORTED = ("StableDiffusionPipeline",)


class UNetDenoiser(Denoiser):
    """A UNet2DConditionModel on a discrete schedule. cond["text"] (B, L, E)."""

    path: Table

    def __init__(self, unet: nn.Module, path: Table, prediction: Prediction):
        super().__init__(path, prediction)
        self.unet = unet
        downs, ups = (
            [f"{side}_blocks.{i}" for i in range(len(getattr(unet, f"{side}_blocks")))] for side in ("down", "up")
        )
        self.taps, self.bottleneck = (*downs, "mid_block", *ups), len(downs)

    def predict(self, x, t, cond):
        index = (t * (self.path.num_timesteps - 1)).to(torch.float32)
        dtype = next(self.unet.parameters()).dtype
        text = cond["text"].to(dtype)
        with tapped(self.unet, self.taps) as features:
            out = self.unet(x.to(dtype), index, encoder_hidden_states=text, return_dict=False)[0]
        return out, tuple(features)


def table_of(scheduler_config: dict[str, Any]) -> Table:
    """The path that a diffusers scheduler's own config declares: betas, rescaling to zero terminal SNR and all."""
    scheduler = DDPMScheduler.from_config(scheduler_config)
    return Table(alphas_cumprod=tuple(scheduler.alphas_cumprod.double().tolist()))


def inspect_folder(folder: Path) -> None:
    """Refuse what cannot be read, from the small files alone. Raises InputError."""
    index = folder / "model_index.json"
    if not index.exists():
        raise InputError(f"{folder} is no diffusers pipeline: it has no model_index.json.")
    declared = read_json(index)
    name = declared.get("_class_name")
    if name not in SUPPORTED:
        raise InputError(f"{folder} is a {name}; onestroke reads {', '.join(SUPPORTED)}.")
    for part in NEEDED:
        if not declared.get(part, [None])[0] or not (folder / part).is_dir():
            raise InputError(f"{folder} lacks the component {part!r}; a {name} needs {', '.join(NEEDED)}.")
        if part in ("tokenizer", "scheduler"):
            continue
        weights = sorted((folder / part).glob("*.safetensors"))
        if not weights:
            pickles = [
                p.name for p in (folder / part).iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
            ]
            found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
            raise InputError(f"{folder / part} holds {found}; save the pipeline with safe_serialization=True.")
        for file in weights:
            try:
                safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} is not a safetensors file ({error}); pickles are never read: "
                    "save the pipeline with safe_serialization=True."
                ) from None
    kind = read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if kind not in PREDICTION:
        raise InputError(f"{folder} predicts {kind!r}; onestroke reads {', '.join(PREDICTION)}.")


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep diffusers' loading bars off the terminal."""
    shown = getattr(logging, "is_progress_bar_enabled", lambda: True)()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_loaded(pipeline: Any, source: str | Path) -> None:
    """Refuse a part whose file lacks some of its weights. Raises InputError.

    diffusers leaves such weights on the meta device; transformers draws them at random and says so in its loading
    report alone, so the text encoder is read once more for that report.
    """
    for part in ("unet", "vae"):
        lost = [name for name, p in getattr(pipeline, part).named_parameters() if p.is_meta]
        if lost:
            raise InputError(f"{source}: {part!r} lacks weights ({len(lost)}, first {lost[0]!r}); save it again.")
    encoder = pipeline.text_encoder
    _, report = type(encoder).from_pretrained(
        source, subfolder="text_encoder", output_loading_info=True, use_safetensors=True
    )
    if lost := sorted(report["missing_keys"]):
        raise InputError(f"{source}: 'text_encoder' lacks weights ({len(lost)}, first {lost[0]!r}); save it again.")


class PipelineTeacher:
    """A diffusers pipeline as a teacher: a denoiser on a path, prompts to conditions, latents to images.

    Attributes: name; pipeline; net, the frozen denoiser; null, the unconditional condition; shape (C, H, W) of one
    latent.
    """

    def __init__(self, pipeline: Any, name: str):
        self.pipeline, self.name = pipeline, name
        path = table_of(dict(pipeline.scheduler.config))
        prediction = PREDICTION[pipeline.scheduler.config.prediction_type]
        try:
            self.net = UNetDenoiser(pipeline.unet, path, prediction).requires_grad_(False).eval()
        except ValueError as error:
            raise InputError(f"teacher {name!r}: {error}") from None
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (pipeline.unet.config.in_channels, height, width)
        self.null = self.encode([""])

    @classmethod
    def load(cls, source: str | Path, name: str | None = None) -> PipelineTeacher:
        """From a folder or a hub id. Raises InputError as `load_teacher`."""
        if isinstance(source, Path):
            inspect_folder(source)
        try:
            with no_bars():
                pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:  # the last two: weights of other shapes
            raise InputError(f"teacher {str(source)!r} could not be read: {str(error).splitlines()[0]}") from None
        if type(pipeline).__name__ not in SUPPORTED:
            raise InputError(f"{source} is a {type(pipeline).__name__}; onestroke reads {', '.join(SUPPORTED)}.")
        check_loaded(pipeline, source)
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.device.type == "cpu":
            # The fused kernel's backward takes half of a training step on a CPU, and it has no forward-mode derivative.
            pipeline.unet.set_attn_processor(AttnProcessor())
        return cls(pipeline, name or str(source))

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's parts by name."""
        return dict(self.pipeline.components)

    @property
    def path(self) -> Table:
        return self.net.path

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device | str) -> PipelineTeacher:
        self.pipeline.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str], batch_size: int = 256) -> Cond:
        """Prompts -> {"text": (N, L, E)}, by the pipeline's own encode_prompt, every distinct prompt once."""
        distinct = list(dict.fromkeys(prompts))
        parts = [
            self.pipeline.encode_prompt(distinct[i : i + batch_size], self.pipeline.device, 1, False)[0]
            for i in range(0, len(distinct), batch_size)
        ]
        rows = {p: i for i, p in enumerate(distinct)}
        return {"text": torch.cat(parts)[torch.tensor([rows[p] for p in prompts])]}

    @property
    def resolution(self) -> tuple[int, int]:
        """(H', W') of the images, in pixels."""
        factor = self.pipeline.vae_scale_factor
        return self.shape[1] * factor, self.shape[2] * factor

    @property
    def scaling(self) -> tuple[float, float]:
        """(factor, shift) of the autoencoder: x0 = factor (latents - shift)."""
        config = self.pipeline.vae.config
        return config.scaling_factor, getattr(config, "shift_factor", None) or 0.0

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H', W') in [0, 1] -> latents x0 (B, C, H, W), without the autoencoder's own noise."""
        if images.shape[2:] != self.resolution:
            raise InputError(f"images must have {self.resolution} pixels, not {tuple(images.shape[2:])}.")
        vae, (factor, shift) = self.pipeline.vae, self.scaling
        out = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1)
        latents = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
        return ((latents - shift) * factor).float()

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""
        vae, (factor, shift) = self.pipeline.vae, self.scaling
        latents = x0.to(vae.dtype) / factor + shift
        return vae.decode(latents, return_dict=False)[0].float().div(2).add(0.5).clamp(0, 1)

    @torch.no_grad()
    def draw(self, noise: Tensor, prompts: list[str], steps: int, guidance_scale: float) -> Tensor:
        """The pipeline's own sampler from `noise` (B, C, H, W) -> images (B, 3, H', W') in [0, 1]."""
        out = self.pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise, output_type="pt"
        )
        return out.images.float()

    def student_pipeline(self, net: nn.Module, few: FewStep) -> Any:
        """The ordinary pipeline that draws as `few.sample(net, ...)` does: its scheduler carries the times."""
        steps, count = len(few.times), self.path.num_timesteps
        if few.start != "unit" or few.times != self.path.grid(steps) or (steps > 1 and few.renoise != "fresh"):
            raise InputError(
                f"times {few.times} from {few.start!r} noise, then {few.renoise!r}, have no standard scheduler."
            )
        scheduler = LCMScheduler.from_config(
            self.pipeline.scheduler.config,
            original_inference_steps=8 if 8 % steps == 0 and count % 8 == 0 else steps,
            clip_sample=False,
            thresholding=False,
        )
        return type(self.pipeline)(
            **{**self.components, "unet": net.unet, "scheduler": scheduler}, requires_safety_checker=False
        )

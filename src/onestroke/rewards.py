"""What a picture is worth to its prompt: a pair of CLIP towers, or a function of one's own, as a reward of latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onestroke.errors import InputError, read_json
from onestroke.paths import Cond

if TYPE_CHECKING:
    from onestroke.teachers.pipeline import PipelineTeacher

CLIP = "clip:"
KEY = "reward"
"""What a reward reads of a condition; networks read other keys."""

Score = Callable[[Tensor, list[str]], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] and their prompts -> (B,), differentiable, larger is better."""


class Judge(Protocol):
    """What sees a picture and what `encode` made of its prompt."""

    def encode(self, prompts: list[str]) -> Tensor:
        """(N, ...), one row per prompt."""

    def __call__(self, images: Tensor, text: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] and rows of `encode` -> (B,)."""


class Towers(nn.Module):
    """The cosine (B,) of a picture and its prompt in the joint space of an image tower and a text tower.

    net: what is moved with the method. see: pixels (B, 3, size, size) -> (B, E), by `net`. embed: prompts -> (N, E).
    preprocessor: the config of the image processor, whose mean and std the middle square of the picture is brought to.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        see: Callable[[Tensor], Tensor],
        embed: Callable[[list[str]], Tensor],
        size: int,
        preprocessor: dict[str, Any],
    ):
        super().__init__()
        self.net, self.see, self.embed, self.size = net, see, embed, size
        for name in ("mean", "std"):
            value = torch.tensor(preprocessor[f"image_{name}"])[:, None, None]
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def encode(self, prompts: list[str], batch_size: int = 256) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        parts = [self.embed(distinct[i : i + batch_size]) for i in range(0, len(distinct), batch_size)]
        rows = {p: i for i, p in enumerate(distinct)}
        return F.normalize(torch.cat(parts).float(), dim=1)[torch.tensor([rows[p] for p in prompts])]

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        height, width = images.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = images[:, :, top : top + side, left : left + side]
        if side != self.size:
            square = F.interpolate(square, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        seen = self.see((square - self.mean) / self.std)
        return F.cosine_similarity(seen.to(torch.promote_types(seen.dtype, torch.float32)), text, dim=1)


class Scored:
    """A function of pictures and their prompts as a judge; the rows of `encode` are the prompts' numbers."""

    def __init__(self, score: Score):
        self.score, self.prompts = score, list[str]()

    def encode(self, prompts: list[str]) -> Tensor:
        first = len(self.prompts)
        self.prompts += prompts
        return torch.arange(first, len(self.prompts))

    def __call__(self, images: Tensor, text: Tensor) -> Tensor:
        return self.score(images, [self.prompts[i] for i in text.tolist()])


class PictureReward(nn.Module):
    """A reward of latents: what the judge says of the teacher's picture of them. Nothing in it is trained."""

    def __init__(self, teacher: PipelineTeacher, judge: Judge):
        super().__init__()
        self.teacher, self.judge, self.vae = teacher, judge, teacher.pipeline.vae  # the last to move with the method
        self.requires_grad_(False).eval()

    def encode(self, prompts: list[str]) -> Tensor:
        """What the reward reads of a condition, under KEY: one row per prompt."""
        return self.judge.encode(prompts)

    def forward(self, x0: Tensor, cond: Cond) -> Tensor:
        """Latents x0 (B, C, H, W) -> (B,), differentiable through the decoder."""
        return self.judge(self.teacher.picture(x0), cond[KEY])


def check_reward(spec: str | Score, source: Any) -> None:
    """Refuse a reward that cannot be loaded, from the small files alone. Raises InputError.

    spec: "" for the teacher's own image tower, "clip:<folder or hub id>", or a function. source: the teacher's folder
    or hub id, or the teacher itself.
    """
    if callable(spec):
        return
    if spec.startswith(CLIP):
        folder = Path(spec.removeprefix(CLIP))
        if folder.is_dir():
            _check_clip(folder)
        elif spec.removeprefix(CLIP).count("/") != 1 or folder.exists():
            raise InputError(f"reward {spec!r}: no such CLIP folder or hub id.")
        return
    if spec:
        raise InputError(f"reward {spec!r} must be '{CLIP}<folder or hub id>', or absent for the teacher's own tower.")
    if hasattr(source, "pipeline"):
        own_towers(source)
    elif isinstance(source, Path):
        declared = read_json(source / "model_index.json")
        if not all(declared.get(part, [None])[0] for part in ("image_encoder", "feature_extractor")):
            raise _no_tower(source)
        seen, read = (read_json(source / part / "config.json") for part in ("image_encoder", "text_encoder"))
        if seen.get("projection_dim") != read.get("hidden_size"):
            raise _no_tower(source)


def _no_tower(source: Any) -> InputError:
    name = getattr(source, "name", source)
    return InputError(
        f"the method needs a reward, and teacher {str(name)!r} has no image tower that pairs with its text encoder; "
        f"give one: reward={CLIP}<folder or hub id>."
    )


def _check_clip(folder: Path) -> None:
    if (kind := read_json(folder / "config.json").get("model_type")) != "clip":
        raise InputError(f"{folder} holds a {kind!r} model; a reward reads 'clip'.")
    for pattern in ("*.safetensors", "preprocessor_config.json", "tokenizer_config.json"):
        if not list(folder.glob(pattern)):
            raise InputError(f"{folder} lacks {pattern}, which a CLIP model folder holds.")


def load_reward(
    spec: str | Score, teacher: PipelineTeacher, model: Callable[[str], Any] | None = None
) -> PictureReward:
    """The reward that `spec` names (see `check_reward`) on the teacher's pictures. Raises InputError.

    model: what makes the CLIP model of a folder or a hub id; by default it is read.
    """
    if callable(spec):
        judge: Any = spec if hasattr(spec, "encode") else Scored(spec)
        return PictureReward(teacher, judge)
    if not spec:
        return PictureReward(teacher, own_towers(teacher))
    return PictureReward(teacher, _load_clip(spec.removeprefix(CLIP), model or _read_clip))


def own_towers(teacher: PipelineTeacher) -> Towers:
    """The teacher's image encoder against its text encoder's pooled state. Raises InputError where they do not pair."""
    pipeline = teacher.pipeline
    vision, processor = (getattr(pipeline, part, None) for part in ("image_encoder", "feature_extractor"))
    width = pipeline.text_encoder.config.hidden_size
    if vision is None or processor is None or vision.config.projection_dim != width:
        raise _no_tower(teacher)

    def embed(prompts: list[str]) -> Tensor:
        teacher.restore()
        ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids.to(pipeline.text_encoder.device)).pooler_output

    def see(pixels: Tensor) -> Tensor:
        return vision(pixels).image_embeds

    return Towers(vision, see, embed, vision.config.image_size, processor.to_dict())


def _read_clip(source: str) -> Any:
    """A CLIP model of transformers with its weights."""
    from transformers import CLIPModel

    loaded: Any = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    net, report = loaded
    if lost := sorted(report["missing_keys"]):
        raise InputError(f"reward {CLIP + source!r} lacks weights ({len(lost)}, first {lost[0]!r}).")
    return net


def _load_clip(source: str, model: Callable[[str], Any]) -> Towers:
    """The towers of the CLIP model of a folder or a hub id, which `model` makes."""
    from transformers import CLIPTokenizer
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        preprocessor, _ = ImageProcessingMixin.get_image_processor_dict(source)
        tokenizer, net = CLIPTokenizer.from_pretrained(source), model(source)
    except (OSError, RuntimeError) as error:
        raise InputError(f"reward {CLIP + source!r} could not be read: {str(error).splitlines()[0]}") from None

    def embed(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        return net.text_projection(net.text_model(**tokens).pooler_output)

    def see(pixels: Tensor) -> Tensor:
        return net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)

    return Towers(net, see, embed, net.config.vision_config.image_size, preprocessor)

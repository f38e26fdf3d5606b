"""Stage 2: tokenizer, text tower and image tower, trained as a pair by the symmetric contrastive loss of CLIP.

The text tower's pooled state is the joint embedding itself (no text projection), so that the text encoder of the
pipeline and the image encoder beside it are all that a retrieval score needs. `--start PIPELINE` continues the image
tower of a saved pipeline alone; its text tower, and so every denoiser that reads it, stays as it is.

    python recipes/emoji64/towers.py --data DATA --work WORK
"""

from __future__ import annotations

import json
import math

import torch
import torch.nn.functional as F
from common import STYLES, arguments, caption, load_data, posed, to_float, train
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 192, 3, 6, 24, 2048
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE with word ends, as CLIP's, learned from the captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet), initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) for m in learned["merges"]]
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH, pad_token=END)


def make_towers(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPVisionModelWithProjection]:
    shape = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    vision = CLIPVisionConfig(image_size=64, patch_size=8, projection_dim=WIDTH, **shape)
    return CLIPTextModel(text), CLIPVisionModelWithProjection(vision)


def make_processor() -> CLIPImageProcessor:
    """The image tower reads 64x64 RGB scaled to -1..1."""
    size = {"height": 64, "width": 64}
    half = [0.5] * 3
    return CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half, do_center_crop=False)


class Towers(nn.Module):
    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text, self.vision = make_towers(tokenizer)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_text(self, ids: Tensor) -> Tensor:
        return F.normalize(self.text(ids).pooler_output.float(), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(self.vision(images).image_embeds.float(), dim=-1)

    def loss(self, images: Tensor, ids: Tensor) -> Tensor:
        logits = self.log_scale.exp().clamp(max=100) * self.embed_images(images) @ self.embed_text(ids).T
        target = torch.arange(len(ids), device=ids.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def jittered(images: Tensor) -> Tensor:
    """A random pose, brightness and contrast, and a little noise, per image."""
    gain, bias = torch.rand(2, len(images), 1, 1, 1).to(images)
    return posed(images) * (0.8 + 0.4 * gain) + 0.3 * (bias - 0.5) + 0.05 * torch.randn_like(images)


def main() -> None:
    args = arguments(__doc__, steps=600, batch=256)
    images, rows, out = load_data(args.data)
    captions = [caption(r) for r in rows]
    if args.start:
        tokenizer = CLIPTokenizer.from_pretrained(args.start, subfolder="tokenizer")
    else:
        tokenizer = make_tokenizer([c for c, o in zip(captions, out, strict=True) if not o])
    styleless = [c.split(", ", 1)[1] for c in captions]
    longest = max(len(i) for i in tokenizer(captions).input_ids)
    print(f"{len(tokenizer)} tokens, longest caption {longest}, {len(STYLES)} styles", flush=True)

    def ids(texts):
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(args.device)

    full, bare, pixels = ids(captions), ids(styleless), to_float(images).to(args.device)
    seen, unseen = (torch.from_numpy(m.nonzero()[0]) for m in (~out, out))
    torch.manual_seed(0)
    net = Towers(tokenizer).to(args.device)
    if args.start:
        net.text = CLIPTextModel.from_pretrained(args.start, subfolder="text_encoder", dtype=torch.float32)
        net.vision = CLIPVisionModelWithProjection.from_pretrained(args.start, subfolder="image_encoder")
        net.float().to(args.device).text.requires_grad_(False)

    def loss(step: int) -> Tensor:
        i = seen[torch.randperm(len(seen))[: args.batch]]
        text = torch.where(torch.rand(len(i), 1).to(args.device) < 0.1, bare[i], full[i])
        with torch.autocast(args.device, torch.bfloat16):
            return net.loss(jittered(pixels[i]), text)

    def report():
        for name, pool in (("seen", seen[torch.randperm(len(seen))[:512]]), ("held-out", unseen)):
            with torch.no_grad():
                score = net.embed_images(posed(pixels[pool])) @ net.embed_text(full[pool]).T
            hits = (score.argmax(1).cpu() == torch.arange(len(pool))).float().mean()
            yield f"{name} R@1 of {len(pool)} {hits:.3f}"

    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "towers.safetensors"
    train(net, loss, path, steps=args.steps, lr=1e-3, weight_decay=0.1, ema=0.995, every=200, report=report)
    tokenizer.save_pretrained(args.work / "tokenizer")
    net.text.save_pretrained(args.work / "text_encoder")
    net.vision.save_pretrained(args.work / "image_encoder")
    make_processor().save_pretrained(args.work / "feature_extractor")


if __name__ == "__main__":
    main()

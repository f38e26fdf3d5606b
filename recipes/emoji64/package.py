"""Put the parts together as a diffusers pipeline in float16, with prompts and card; real images' features beside it.

python recipes/emoji64/package.py --data DATA --work WORK --out src/onestroke/teachers/built_in/emoji64
python recipes/emoji64/package.py --data DATA --work WORK --out src/onestroke/teachers/built_in/emoji64-flow --flow
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import flow
import torch
import unet
from common import STYLES, caption, load_data, posed, to_float
from safetensors.torch import save_file

from onestroke.metrics import REFERENCES, LiteFeatures, psnr

REFERENCE = 1_000
GUIDANCE = 3.0
SHEET = [
    "fluent 3d, grinning face with big eyes",
    "noto, red apple",
    "twemoji, rocket",
    "fluent flat, cat face",
    "fluent modern, octopus",
    "noto, hot beverage",
    "fluent 3d, teddy bear",
    "twemoji, christmas tree",
    "fluent flat, guitar",
    "noto, tropical fish",
    "twemoji, smiling face with sunglasses",
    "fluent 3d, hamburger",
]
CARD = """---
license: other
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A small text-to-image latent diffusion model in the standard `{pipeline}` format: 64x64 pixels, latents of
8x8x16, {process}. Prompts read "style, name"; the styles are {styles}.

| part | class | parameters |
|---|---|---|
{parts}

Trained by `recipes/emoji64/` on {seen} images of {concepts} emoji concepts in five styles, each at random sizes, tilts
and places: the caption says what is drawn, the noise how it lies. {unseen} images of 5 % of
the concepts were held out (by concept, never by image). Held-out reconstruction: {psnr:.2f} dB, the mean of the images'
PSNR ({pooled:.2f} dB from the pooled squared error).{beside}

## Licence and attribution
The weights are Apache-2.0. They were learned from, and their pictures derive from, these artworks:
- Fluent Emoji, (c) Microsoft Corporation, MIT.
- Noto Emoji, (c) Google LLC, Apache-2.0.
- Twemoji, (c) Twitter, Inc and other contributors, graphics licensed under CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/); resized to 64x64 and composited on white.
- Names from emojibase-data, (c) Miles Johnson, MIT.
"""


BESIDE = """ `image_encoder` is the image tower that pairs with the text
encoder; it serves the retrieval score and takes no part in drawing."""
FLOW_BESIDE = """ The first two text
encoders are the one tower of emoji64, and the autoencoder is its own. The third, which the class asks for, says
nothing: its states are zero."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--flow", action="store_true", help="the denoiser of flow.py, not that of unet.py")
    args = parser.parse_args()
    images, rows, held = load_data(args.data)
    pipeline = (flow if args.flow else unet).make_pipeline(args.work)
    parts = {name: module for name, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    unseen = to_float(images[held])
    with torch.no_grad():
        vae = parts["vae"].float()
        back = torch.cat([vae(x).sample for x in unseen.split(128)])
        vae.half()
    each, pooled = psnr(back / 2 + 0.5, unseen / 2 + 0.5)
    pipeline.save_pretrained(args.out)
    for file in args.out.glob("*/config.json"):  # diffusers writes where a part was read
        kept = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
        file.write_text(json.dumps(kept, indent=2) + "\n")

    names = sorted({r["caption"].lower() for r, h in zip(rows, held, strict=True) if not h})
    prompts = [f"{style}, {name}" for name in names for style in STYLES.values()]
    tokenizer = pipeline.tokenizer  # what it would cut is left out
    prompts = [p for p in prompts if len(tokenizer(p).input_ids) <= tokenizer.model_max_length]
    (args.out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    held_out = sorted({caption(r) for r, h in zip(rows, held, strict=True) if h})
    (args.out / "held_out.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    (args.out / "sheet.txt").write_text("\n".join(SHEET) + "\n", encoding="utf-8")

    seen = torch.from_numpy((~held).nonzero()[0])
    chosen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[:REFERENCE]]
    torch.manual_seed(0)
    features = LiteFeatures().of(posed(to_float(images[chosen])) / 2 + 0.5)
    REFERENCES.mkdir(exist_ok=True)
    save_file({"features": features.half()}, REFERENCES / f"{args.out.name}.safetensors")

    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()}
    about = {
        "summary": "emoji in five styles, in any pose, from 'style, name'",
        "resolution": 64,
        "parameters": sum(counts.values()),
        "pipeline": type(pipeline).__name__,
        "prediction": "flow" if args.flow else "v",
        "guidance_scale": GUIDANCE,
        "licence": "Apache-2.0; artwork MIT, Apache-2.0, CC-BY-4.0",
        "autoencoder_psnr": {"mean_of_images": round(each, 2), "pooled": round(pooled, 2)},
    }
    (args.out / "onestroke.json").write_text(json.dumps(about, indent=2) + "\n")
    table = "\n".join(f"| {k} | {type(m).__name__} | {counts[k]:,} |" for k, m in parts.items())
    concepts = len({r["hex"] for r, h in zip(rows, held, strict=True) if not h})
    card = CARD.format(
        name=args.out.name,
        pipeline=type(pipeline).__name__,
        process="flow matching" if args.flow else "v-prediction with zero terminal SNR",
        beside=FLOW_BESIDE if args.flow else BESIDE,
        styles=", ".join(STYLES.values()),
        parts=table,
        seen=len(seen),
        concepts=concepts,
        unseen=int(held.sum()),
        psnr=each,
        pooled=pooled,
    )
    (args.out / "README.md").write_text(card)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(json.dumps(about | {"megabytes": round(size / 1e6, 2)}, indent=2))


if __name__ == "__main__":
    main()

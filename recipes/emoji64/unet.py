"""Stage 3: the denoiser, a UNet2DConditionModel of 7 M parameters on the 8x8x16 latents, v-prediction.

The schedule is Stable Diffusion's, rescaled to zero terminal SNR, so that the last timestep is pure noise and the
one-step student starts where it was trained. One caption in ten is empty, for classifier-free guidance. Every picture
is learned in POSES random poses, so that a caption does not determine it.
`--start PIPELINE` continues the denoiser of a saved pipeline.

    python recipes/emoji64/unet.py --data DATA --work WORK
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from common import POSES, arguments, caption, load_data, posed_latents, train
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

BARE, EMPTY = 0.1, 0.1


def make_unet(width: int = 192) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(128, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_pipeline(work: Path) -> StableDiffusionPipeline:
    """The pipeline of the parts in WORK, in float16."""
    parts = {
        "vae": AutoencoderTiny.from_pretrained(work / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(work / "text_encoder"),
        "unet": UNet2DConditionModel.from_pretrained(work / "unet"),
        "image_encoder": CLIPVisionModelWithProjection.from_pretrained(work / "image_encoder"),
    }
    return StableDiffusionPipeline(
        **{name: module.half() for name, module in parts.items()},
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(work / "scheduler"),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor.from_pretrained(work / "feature_extractor"),
        requires_safety_checker=False,
    )


@torch.no_grad()
def encode_texts(tokenizer: CLIPTokenizer, text: CLIPTextModel, captions: list[str]) -> Tensor:
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([text(i).last_hidden_state for i in ids.split(256)])


def main() -> None:
    args = arguments(__doc__, steps=20_000, batch=64)
    images, rows, out = load_data(args.data)
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.work / "text_encoder").eval()
    vae = AutoencoderTiny.from_pretrained(args.work / "vae").eval()
    captions = [caption(r) for r in rows]
    full = encode_texts(tokenizer, text, captions).to(args.device)
    bare = encode_texts(tokenizer, text, [c.split(", ", 1)[1] for c in captions]).to(args.device)
    empty = encode_texts(tokenizer, text, [""]).to(args.device)
    latents = posed_latents(vae, images, args.work / "latents.safetensors", args.device)
    seen, unseen = (torch.from_numpy(m.nonzero()[0]) for m in (~out, out))

    scheduler = make_scheduler()
    scheduler.save_pretrained(args.work / "scheduler")
    torch.manual_seed(0)
    net = UNet2DConditionModel.from_pretrained(args.start, subfolder="unet") if args.start else make_unet()
    net.to(args.device)
    if args.device == "cpu":
        net.set_attn_processor(AttnProcessor())  # the fused kernel's backward is half of a step here
    fast = torch.compile(net)

    def error(call, i: Tensor, context: Tensor, t: Tensor) -> Tensor:
        x0 = latents[torch.randint(POSES, i.shape), i].float()
        noise = torch.randn(x0.shape).to(x0)
        with torch.autocast(args.device, torch.bfloat16):
            v = call(scheduler.add_noise(x0, noise, t), t, context).sample
        return F.mse_loss(v.float(), scheduler.get_velocity(x0, noise, t))

    def loss(step: int) -> Tensor:
        i = seen[torch.randint(len(seen), (args.batch,))]
        t = (
            ((torch.arange(args.batch) + torch.rand(args.batch)) * 1000 / args.batch).long().to(args.device)
        )  # stratified
        which = torch.rand(args.batch, 1, 1).to(args.device)
        context = torch.where(which < EMPTY, empty, torch.where(which < EMPTY + BARE, bare[i], full[i]))
        return error(fast, i, context, t)

    def report():
        t = torch.linspace(0, 999, len(unseen)).long().to(args.device)
        with torch.no_grad():
            yield f"held-out {error(net, unseen, full[unseen], t):.4f}"

    path = args.work / "unet.safetensors"
    train(net, loss, path, steps=args.steps, lr=1e-3, ema=0.9995, hold=0.7, every=500, report=report)
    net.save_pretrained(args.work / "unet")


if __name__ == "__main__":
    main()

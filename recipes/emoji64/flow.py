"""The denoiser of emoji64-flow: an SD3Transformer2DModel of 6.5 M parameters on emoji64's latents, flow matching.

It needs stages 1 and 2. The class reads two CLIP text encoders and the pooled state of both: both are the one text
tower, with an identity for its projection. Its T5 says nothing: 256 tokens of zeros, as the class gives where there is
none, but without one plain `from_pretrained` refuses the folder. They have no places, so they stay equal, and training
has one token that counts for all. One caption in ten is empty, for
classifier-free guidance.

    python recipes/emoji64/flow.py --data DATA --work WORK
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from common import POSES, arguments, caption, load_data, posed_latents, train
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from towers import WIDTH
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from unet import BARE, EMPTY

LENGTH = 16  # tokens; of the captions 0.2 % are longer
ZEROS = 256  # tokens of T5


class Counted:
    """Joint attention in which the last token of the context stands for ZEROS equal ones: log ZEROS on its logit."""

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None):
        def heads(*streams: Tensor) -> Tensor:
            return torch.cat([x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in streams], 2)

        x, c = hidden_states, encoder_hidden_states
        q = torch.cat([attn.norm_q(heads(attn.to_q(x))), attn.norm_added_q(heads(attn.add_q_proj(c)))], 2)
        k = torch.cat([attn.norm_k(heads(attn.to_k(x))), attn.norm_added_k(heads(attn.add_k_proj(c)))], 2)
        count = torch.ones(1, k.shape[2], device=k.device)
        count[:, -1] = ZEROS
        out = F.scaled_dot_product_attention(q, k, heads(attn.to_v(x), attn.add_v_proj(c)), count.log().to(q))
        x, c = out.transpose(1, 2).flatten(2).split([x.shape[1], c.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](x)), c if attn.context_pre_only else attn.to_add_out(c)


def make_net(width: int = WIDTH, heads: int = 6, head_dim: int = 32, layers: int = 5) -> SD3Transformer2DModel:
    """For two text encoders of this width."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        caption_projection_dim=heads * head_dim,
        joint_attention_dim=2 * width,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def projected(text: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same tower, its pooled state projected by the identity."""
    config = CLIPTextConfig(**{**text.config.to_dict(), "projection_dim": text.config.hidden_size})
    tower = CLIPTextModelWithProjection(config).float()
    tower.text_model.load_state_dict({k.removeprefix("text_model."): v for k, v in text.state_dict().items()})
    torch.nn.init.eye_(tower.text_projection.weight)
    return tower.eval()


def silence(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 of this width whose every state is zero."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    t5 = T5EncoderModel(config)
    torch.nn.init.zeros_(t5.encoder.final_layer_norm.weight)
    return t5.eval(), T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=ZEROS)


def around(net: SD3Transformer2DModel, work: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a denoiser and the other parts in WORK, in float32."""
    text = projected(CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32))
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=LENGTH)
    t5, tokenizer_3 = silence(net.config.joint_attention_dim)
    return StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=AutoencoderTiny.from_pretrained(work / "vae").eval(),
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=text,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer_3,
    )


def make_pipeline(work: Path) -> StableDiffusion3Pipeline:
    """The pipeline of the parts in WORK, in float16."""
    return around(SD3Transformer2DModel.from_pretrained(work / "transformer"), work).to(torch.float16)


@torch.no_grad()
def encode_texts(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What the pipeline makes of prompts (N): tokens (N, LENGTH + 1, C), one of the zeros, and pooled (N, C)."""
    found = []
    for k in range(0, len(captions), 256):
        tokens, _, pooled, _ = pipeline.encode_prompt(
            captions[k : k + 256], None, None, do_classifier_free_guidance=False
        )
        assert tokens.shape[1] == LENGTH + ZEROS
        assert not tokens[:, LENGTH:].any()
        found.append((tokens[:, : LENGTH + 1], pooled))
    tokens, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tokens, pooled


def main() -> None:
    args = arguments(__doc__, steps=8_000, batch=64)
    images, rows, out = load_data(args.data)
    torch.manual_seed(0)
    logging.set_verbosity_error()  # the pipeline reports every caption that is cut
    if args.start:
        net = SD3Transformer2DModel.from_pretrained(args.start, subfolder="transformer", torch_dtype=torch.float32)
    else:
        net = make_net()
    pipeline = around(net, args.work)
    captions = [caption(r) for r in rows]
    contexts = [
        [part.to(args.device) for part in encode_texts(pipeline, texts)]
        for texts in (captions, [c.split(", ", 1)[1] for c in captions], [""])
    ]
    latents = posed_latents(pipeline.vae, images, args.work / "latents.safetensors", args.device)
    seen, unseen = (torch.from_numpy(m.nonzero()[0]) for m in (~out, out))
    net.to(args.device).set_attn_processor(Counted())

    def error(i: Tensor, context: list[Tensor], t: Tensor) -> Tensor:
        x0 = latents[torch.randint(POSES, i.shape), i].float()
        noise, at = torch.randn(x0.shape).to(x0), t[:, None, None, None]
        with torch.autocast(args.device, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            v = net((1 - at) * x0 + at * noise, context[0], context[1], 1000 * t).sample
        return F.mse_loss(v.float(), noise - x0)

    def loss(step: int) -> Tensor:
        i = seen[torch.randint(len(seen), (args.batch,))]
        u = (torch.arange(args.batch) + torch.rand(args.batch)) / args.batch  # stratified
        t = torch.special.ndtri(u.double()).sigmoid().float().to(args.device)  # logit-normal, as SD3's
        which = torch.rand(args.batch, 1, 1).to(args.device)
        context = []
        for full, bare, empty in zip(*contexts, strict=True):
            w = which if full.ndim == 3 else which[:, 0]
            context.append(torch.where(w < EMPTY, empty, torch.where(w < EMPTY + BARE, bare[i], full[i])))
        return error(i, context, t)

    def report():
        t = torch.linspace(0.001, 0.999, len(unseen)).to(args.device)
        with torch.no_grad():
            yield f"held-out {error(unseen, [part[unseen] for part in contexts[0]], t):.4f}"

    path = args.work / "flow.safetensors"
    train(net, loss, path, steps=args.steps, lr=1e-3, ema=0.9995, hold=0.7, every=500, report=report)
    net.save_pretrained(args.work / "transformer")


if __name__ == "__main__":
    main()

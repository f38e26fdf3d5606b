"""Tiny pipelines of the real diffusers and transformers classes, one per family, randomly initialised: 16 px."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import nn

from onestroke.teachers.pipeline import PipelineTeacher

LETTERS = string.ascii_lowercase
WIDTH = 16  # of the text


class Family(NamedTuple):
    """How a tiny pipeline is made, and the size that it draws in."""

    make: Callable[[], Any]
    size: tuple[int, int] | None = None


# ---- text ------------------------------------------------------------------------------------------------------------


def clip(width: int = WIDTH, projected: bool = False) -> tuple[nn.Module, Any]:
    pieces = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=16, pad_token="<|endoftext|>"
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config), tokenizer


def t5(width: int = WIDTH) -> tuple[nn.Module, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config), tokenizer


def gemma() -> tuple[nn.Module, Any]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"glq"]  # few, for SANA's long instruction to be short
    tokenizer = transformers.GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    config = transformers.Gemma2Config(vocab_size=len(pieces), **decoder(), head_dim=8, pad_token_id=0, bos_token_id=2)
    return transformers.Gemma2Model(config), tokenizer


def decoder() -> dict[str, int]:
    """The size of a tiny language model."""
    return dict(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )


def qwen_tokenizer() -> Any:
    pieces = ["<|endoftext|>", "Ġ", *LETTERS]
    template = "{% for m in messages %}{{ m['content'] }} end{% endfor %}"
    return transformers.Qwen2Tokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], chat_template=template, model_max_length=512
    )


def qwen3() -> tuple[nn.Module, Any]:
    tokenizer = qwen_tokenizer()
    return transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=40, **decoder(), head_dim=8)), tokenizer


def qwen_vl() -> tuple[nn.Module, Any]:
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=40,
            **decoder(),
            rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH, fullatt_block_indexes=[0]
        ),
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), qwen_tokenizer()


# ---- pictures --------------------------------------------------------------------------------------------------------


def kl(levels: int = 2, **options: Any) -> nn.Module:
    """An AutoencoderKL: with two levels 16 px become 4 x 8 x 8."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        **{"scaling_factor": 0.6, **options},
    )


def dc() -> nn.Module:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )


def betas(name: str = "DDIMScheduler", **options: Any) -> Any:
    return getattr(diffusers, name)(
        **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **options}
    )


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=64)


# ---- pipelines with a UNet -------------------------------------------------------------------------------------------


def unet(**options: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        **{"cross_attention_dim": WIDTH, "attention_head_dim": 2, **options},
    )


def sd(scheduler: Any, **options: Any) -> Any:
    encoder, tokenizer = clip()
    return diffusers.StableDiffusionPipeline(
        vae=kl(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet(**options),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15() -> Any:
    return sd(betas("PNDMScheduler", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False))


def sd21() -> Any:
    scheduler = betas(prediction_type="v_prediction", steps_offset=1, clip_sample=False, rescale_betas_zero_snr=True)
    return sd(scheduler, use_linear_projection=True, attention_head_dim=4)


def sdxl() -> Any:
    (one, tokenizer), (two, tokenizer_2) = clip(), clip(projected=True)
    net = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=kl(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 1.2]),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        unet=net,
        scheduler=betas("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


# ---- pipelines with a transformer ------------------------------------------------------------------------------------


def sd3() -> Any:
    (one, tokenizer), (two, tokenizer_2), (three, tokenizer_3) = clip(projected=True), clip(projected=True), t5(40)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=net,
        scheduler=flow(shift=3.0),
        vae=kl(shift_factor=0.2),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        text_encoder_3=three,
        tokenizer_3=tokenizer_3,
    )


def sana() -> Any:
    encoder, tokenizer = gemma()
    net = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )
    scheduler = betas(
        "DPMSolverMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=dc(), transformer=net, scheduler=scheduler
    )


def pixart(sigma: bool) -> Any:
    """Its alpha reads the size of the picture and its aspect ratio, and both predict a variance as well."""
    encoder, tokenizer = t5()
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=4,
        cross_attention_dim=24,
        sample_size=8 if sigma else 128,
        caption_channels=WIDTH,
    )
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    scheduler = betas("DPMSolverMultistepScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return kind(tokenizer=tokenizer, text_encoder=encoder, vae=kl(), transformer=net, scheduler=scheduler)


def flux(guided: bool) -> Any:
    (one, tokenizer), (two, tokenizer_2) = clip(), t5()
    net = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        scheduler=flow(shift=3.0, **DYNAMIC) if guided else flow(),
        vae=kl(shift_factor=0.1),
        text_encoder=one,
        tokenizer=tokenizer,
        text_encoder_2=two,
        tokenizer_2=tokenizer_2,
        transformer=net,
    )


def lumina2() -> Any:
    encoder, tokenizer = gemma()
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=net,
        scheduler=flow(shift=6.0),
        vae=kl(levels=4, shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )


def z_image() -> Any:
    encoder, tokenizer = qwen3()
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 32, 32],
    )
    return diffusers.ZImagePipeline(
        scheduler=flow(shift=3.0), vae=kl(shift_factor=0.1), text_encoder=encoder, tokenizer=tokenizer, transformer=net
    )


def qwen_image() -> Any:
    encoder, tokenizer = qwen_vl()
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 1.2],
    )
    return diffusers.QwenImagePipeline(
        scheduler=flow(**{**DYNAMIC, "max_shift": 0.9}, shift_terminal=0.02),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=net,
    )


FAMILIES = {
    "sd15": Family(sd15),
    "sd21": Family(sd21),
    "sdxl": Family(sdxl, (24, 16)),
    "sd3": Family(sd3),
    "sana": Family(sana, (32, 64)),
    "pixart-alpha": Family(lambda: pixart(sigma=False), (16, 24)),
    "pixart-sigma": Family(lambda: pixart(sigma=True)),
    "flux": Family(lambda: flux(guided=False), (24, 16)),
    "flux-guided": Family(lambda: flux(guided=True), (16, 16)),
    "lumina2": Family(lumina2, (32, 64)),
    "z-image": Family(z_image, (16, 24)),
    "qwen-image": Family(qwen_image, (16, 24)),
}


def pipeline_of(name: str) -> Any:
    """The tiny pipeline of a family, the same whenever it is made."""
    torch.manual_seed(0)
    return FAMILIES[name].make()


class Teachers(dict[str, PipelineTeacher]):
    """The teachers by the name of their family, each written to `root` and read from there once it is asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> PipelineTeacher:
        pipeline_of(name).save_pretrained(self.root / name)
        self[name] = PipelineTeacher.load(self.root / name, size=FAMILIES[name].size)
        return self[name]

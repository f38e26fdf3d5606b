"""Fixtures: exact teachers on every path, and a tiny pipeline of the real diffusers classes on disk."""

from __future__ import annotations

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: bit-equality needs one number of threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")
os.environ["ONESTROKE_CACHE"] = tempfile.mkdtemp(prefix="onestroke-cache-")

import pytest
import torch

torch.set_num_threads(1)

PROMPTS = ["a red square", "a blue circle", "a green star", "a cat on a mat", "an old oak", "rain"]


def tiny_pipeline(prediction_type: str = "v_prediction", zero_snr: bool = True, seed: int = 0):
    """A StableDiffusionPipeline of the real classes, randomly initialised: 16 px, 4x4x4 latents."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=16, pad_token="<|endoftext|>"
    )
    text = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A tiny v-prediction pipeline with zero terminal SNR, saved to disk."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """A tiny teacher of every family, by name, loaded from disk once it is asked for."""
    from families import Teachers

    return Teachers(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path

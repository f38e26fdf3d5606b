"""The command line, called in the test's own process."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from conftest import tiny_pipeline
from onestroke import cli


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def onestroke(monkeypatch, capsys):
    """Call the command line in this process: onestroke("methods", "--json") -> Said.

    What cli.quiet does by environment variables before these libraries are imported is done to them here.
    """
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.is_progress_bar_enabled(), library.get_verbosity()) for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()

    def call(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["onestroke", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Said(code, *capsys.readouterr())

    yield call
    for library, (shown, verbosity) in zip(libraries, before, strict=True):
        library.set_verbosity(verbosity)
        if shown:
            library.enable_progress_bar()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP model of the real classes, randomly initialised: 8 px pictures, the tokenizer of the tiny pipeline."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(1)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_pipeline().tokenizer
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=12)
    size = {"height": 8, "width": 8}
    processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.3] * 3)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    for part in (CLIPModel(config), tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """on_hub("name"): where the hub's cache looks for the files of org/name; nothing else can be had."""

    def place(name: str):
        repo = tmp_path / "hub" / f"models--org--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return repo / "snapshots" / ("0" * 40)

    return place


@pytest.fixture(scope="session")
def towered_folder(tmp_path_factory):
    """The tiny pipeline with an image tower as wide as its text encoder."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    pipeline = tiny_pipeline()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=16, patch_size=4, projection_dim=16, **shape))
    size, half = {"height": 16, "width": 16}, [0.5] * 3
    processor = CLIPImageProcessorPil(size=size, crop_size=size, image_mean=half, image_std=half, do_center_crop=False)
    pipeline.register_modules(image_encoder=tower, feature_extractor=processor)
    folder = tmp_path_factory.mktemp("towered") / "tiny"
    pipeline.save_pretrained(folder)
    return folder

"""The defaults that are published, typed from the papers and their code: a method without options is the paper's."""

from __future__ import annotations

import pytest

from onestroke.methods import get_method, options

PUBLISHED = {
    "cd": {"keep": 0.95},
    "ct": {"first": 2, "last": 150, "keep": 0.95, "batch_size": 256},
    "ict": {"first": 10, "last": 1280, "scale": 0.00054, "mean": -1.1, "std": 2.0},
    "ect": {"q": 2.0, "stages": 8, "k": 8.0, "b": 1.0, "c": 0.0, "mean": -1.1, "std": 2.0},
    "lcm": {"grid": 50, "keep": 0.95, "distance": "huber", "guidance_scale": 11.0, "spread": 0.5},
    "tcd": {"grid": 50, "whole": 0.0},
    "scm": {"ramp": 10_000, "velocity": "teacher", "batch_size": 2048, "clip": 0.0, "betas": {"*": [0.9, 0.99]}},
    "sana-sprint": {"std": 1.6, "ramp": 2_000, "norm": 0.2, "gan": 0.5, "top": 0.5, "gan_std": 1.0, "loss": "hinge",
                    "spread": 0.5, "guidance_scale": 4.5, "warmup": 5000, "clip": 0.1},
    "rcm": {"mean": -0.8, "std": 1.6, "sigma_data": 1.0, "ramp": 1_000, "norm": 0.1, "scale": 100.0,
            "guidance_scale": 5.0, "weight_decay": 0.01, "clip": 0.0, "betas": {"*": [0.0, 0.999]}},
    "pcm": {"gan_weight": 0.1, "keep": 0.0, "distance": "huber", "loss": "hinge", "guidance_scale": 5.5,
            "weight_decay": 1e-3, "lr": {"student": 5e-6, "heads": 1e-5}, "lora_alpha": {"student": 8}},
    "ctm": {"levels": 18, "keep": 0.999, "sigma_data": 0.5, "loss": "hinge", "lr": {"student": 8e-6, "heads": 2e-3}},
    "lcm-lora": {"grid": 50, "guidance_scale": 11.0},
    "hyper-sd": {"segments": 8, "whole": 0.0},
    "slam": {"grid": 50, "keep": 0.95, "distance": "huber", "guidance_scale": 9.0},
    "scott": {"keep": 0.95, "distance": "huber", "loss": "hinge"},
    "shortcut": {"grid": 128, "share": 1 / 8, "keep": 0.999, "limit": 4.0, "weight_decay": 0.1},
    "meanflow": {"mean": -0.4, "std": 1.0, "end_std": 0.0, "equal": 0.75, "jump": 0.0, "power": 1.0, "c": 0.01,
                 "batch_size": 256},
    "imf": {"mean": -0.4, "std": 1.0, "end_std": 0.0, "equal": 0.5, "jump": 0.0, "power": 1.0, "c": 0.01,
            "batch_size": 1024},
    "hipa": {"lora_rank": {"student": 16}},
    "rectified-flow": {"lo": 0.001, "hi": 1.0, "ends": 0.0},
    "progressive": {"batch_size": 128, "clip": 1.0, "ema": 0.0, "renoise": "implied"},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_method_without_options_is_the_published_one(name):
    cls = get_method(name)
    found = {**cls.defaults, **options(cls)}
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_step_of_boot_is_in_the_published_range():
    """0.03 to 0.05 of the way."""
    assert 0.03 <= options(get_method("boot"))["delta"] <= 0.05

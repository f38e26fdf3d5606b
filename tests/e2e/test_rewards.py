"""Rewards of a run: what a picture is worth, and what is said of a reward that cannot be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import onestroke
from conftest import PROMPTS
from onestroke import metrics
from onestroke.errors import InputError
from onestroke.rewards import KEY, check_reward, load_reward
from onestroke.teachers import BUILT_IN, load_teacher
from onestroke.teachers.pipeline import PipelineTeacher

METHOD = "diff-instruct-pp"
SMALL = {"steps": 2, "batch_size": 2, "log_with": "none", "guidance_scale": 2.0}


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


# ---- what rewards say ------------------------------------------------------------------------------------------------


def test_a_clip_folder_scores_as_transformers_does(clip_folder, pipeline_folder):
    """CLIPModel's own logits over its scale, on pictures that need no resizing."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    judge = load_reward(f"clip:{clip_folder}", load_teacher(pipeline_folder)).judge
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], 0.3
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = model(pixel_values=(images - mean) / std, **tokens).logits_per_image / model.logit_scale.exp()
    torch.testing.assert_close(judge(images, judge.encode(PROMPTS)), want.diagonal(), rtol=1e-5, atol=1e-6)
    assert judge(images, judge.encode(PROMPTS)).std() > 1e-3


def test_a_wide_picture_is_judged_by_its_middle(clip_folder, pipeline_folder):
    judge = load_reward(f"clip:{clip_folder}", load_teacher(pipeline_folder)).judge
    images, text = torch.rand(6, 3, 12, 12), judge.encode(PROMPTS)
    wide = F.pad(images, (4, 4), value=0.3)
    assert torch.equal(judge(wide, text), judge(images, text))


def test_the_built_in_tower_is_that_of_the_retrieval_score():
    """Nearest by the reward is nearest by the score: the part of rows won by the diagonal is `retrieval`."""
    teacher = load_teacher("emoji64")
    reward = load_reward("", teacher)
    prompts = (BUILT_IN / "emoji64" / "sheet.txt").read_text().splitlines()
    x0 = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(0))
    text, images = reward.encode(prompts), teacher.decode(x0)
    with torch.no_grad():
        columns = [reward(x0, {KEY: row.expand(len(x0), -1)}) for row in text]
    won = torch.stack(columns, 1).argmax(1) == torch.arange(len(prompts))
    assert won.float().mean().item() == pytest.approx(metrics.retrieval(teacher.pipeline, images, prompts))


def test_the_reward_of_drawn_pictures_knows_their_prompts():
    """emoji64's own pictures are worth more to their prompt than to the next one's."""
    teacher = load_teacher("emoji64")
    reward = load_reward("", teacher)
    prompts = ["noto, red apple", "twemoji, rocket", "noto, dog face", "noto, rainbow"]
    noise = torch.randn(4, *teacher.shape, generator=torch.Generator().manual_seed(0))
    drawn = teacher.pipeline(prompts, num_inference_steps=8, latents=noise, guidance_scale=3.0, output_type="latent")
    x0 = drawn.images
    text = reward.encode(prompts)
    with torch.no_grad():
        own, other = reward(x0, {KEY: text}), reward(x0, {KEY: text.roll(1, 0)})
    assert (own > other + 0.1).all()


@pytest.mark.parametrize("own", [True, False])
def test_the_gradient_is_that_of_the_picture(own, towered_folder, clip_folder):
    """Central differences through decoder and tower, in float64; nothing in them gets a gradient of its own."""
    teacher = PipelineTeacher.load(towered_folder)
    reward = load_reward("" if own else f"clip:{clip_folder}", teacher).double()
    generator = torch.Generator().manual_seed(3)
    x0, way = torch.randn(2, 2, *teacher.shape, generator=generator, dtype=torch.float64)
    cond = {KEY: reward.encode(PROMPTS[:2])}
    x0.requires_grad_(True)
    reward(x0, cond).sum().backward()
    h = 1e-6
    with torch.no_grad():
        want = (reward(x0 + h * way, cond) - reward(x0 - h * way, cond)).sum() / (2 * h)
    assert (x0.grad * way).sum().item() == pytest.approx(want.item(), rel=1e-3, abs=1e-7)
    assert abs(want) > 1e-4
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())


def test_a_teacher_that_has_been_used_gives_its_tower_again(towered_folder):
    teacher = PipelineTeacher.load(towered_folder)
    before = load_reward("", teacher).encode(PROMPTS)
    teacher.park()
    assert torch.equal(load_reward("", teacher).encode(PROMPTS), before)


def test_a_function_sees_pictures_and_their_prompts(pipeline_folder):
    teacher, seen = load_teacher(pipeline_folder), []

    def score(images, prompts):
        seen.append((images, prompts))
        return images.mean((1, 2, 3)) * torch.tensor([float(len(p)) for p in prompts])

    reward = load_reward(score, teacher)
    rows, null = reward.encode(PROMPTS), reward.encode([""])
    x0 = torch.randn(3, *teacher.shape, requires_grad=True)
    got = reward(x0, {KEY: torch.cat([rows[[4, 1]], null])})
    images, prompts = seen[0]
    assert prompts == [PROMPTS[4], PROMPTS[1], ""]
    assert torch.equal(images, teacher.decode(x0))
    got.sum().backward()
    assert (x0.grad[:2] != 0).any()
    assert not x0.grad[2].any()


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_takes_the_teachers_own_tower_by_default(towered_folder, prompt_file, tmp_path):
    student = onestroke.distill(str(towered_folder), method=METHOD, prompts=prompt_file, out=tmp_path / "a", **SMALL)
    assert student.card["method"] == METHOD
    onestroke.distill(
        str(towered_folder), method=METHOD, prompts=prompt_file, out=tmp_path / "b", **SMALL, reward_weight=0.0
    )
    before, a, b = (weights(f) for f in (towered_folder, tmp_path / "a", tmp_path / "b"))
    assert any(not torch.equal(before[k], a[k]) for k in a)
    assert any(not torch.equal(a[k], b[k]) for k in a), "the reward moves nothing"


def test_a_run_takes_a_clip_folder_and_names_it(clip_folder, pipeline_folder, prompt_file, tmp_path):
    out, spec = tmp_path / "run", f"clip:{clip_folder}"
    settings = {"method": METHOD, "prompts": prompt_file, "out": out, "reward": spec}
    onestroke.distill(str(pipeline_folder), **settings, **SMALL)
    assert json.loads((out / "recipe.json").read_text())["settings"]["reward"] == spec
    with pytest.raises(InputError, match="its setting reward is"):
        onestroke.distill(str(pipeline_folder), **settings | {"reward": len}, **SMALL, resume=True)


def test_a_run_takes_a_function(pipeline_folder, prompt_file, tmp_path):
    """Black is worth most: two runs that differ by the sign of the reward differ."""

    def black(images, prompts):
        assert set(prompts) <= {*PROMPTS, ""}
        return -images.mean((1, 2, 3))

    found = []
    for name, reward in (("black", black), ("white", lambda images, prompts: -black(images, prompts))):
        out = tmp_path / name
        onestroke.distill(str(pipeline_folder), method=METHOD, prompts=prompt_file, out=out, reward=reward, **SMALL)
        found.append(weights(out))
    assert any(not torch.equal(found[0][k], found[1][k]) for k in found[0])
    recipe = json.loads((tmp_path / "black" / "recipe.json").read_text())
    assert recipe["settings"]["reward"].endswith("black")


# ---- what is refused, before anything is loaded ----------------------------------------------------------------------


@pytest.fixture
def assert_refused(monkeypatch, prompt_file, tmp_path):
    """distill(teacher, reward=...) must be refused without loading, and write nothing."""

    def never(*args, **kwargs):
        raise AssertionError("something heavy was loaded")

    monkeypatch.setattr(PipelineTeacher, "load", never)

    def call(teacher, says, method=METHOD, **given):
        with pytest.raises(InputError) as error:
            onestroke.distill(str(teacher), method=method, prompts=prompt_file, out=tmp_path / "out", **given)
        assert says in str(error.value), error.value
        assert not (tmp_path / "out").exists()

    return call


def test_a_teacher_without_a_tower(assert_refused, pipeline_folder):
    assert_refused(
        pipeline_folder, "has no image tower that pairs with its text encoder; give one: reward=clip:<folder"
    )


def test_a_tower_of_another_width(assert_refused, towered_folder, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(towered_folder, folder)
    config = folder / "image_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"projection_dim": 24}))
    assert_refused(folder, "has no image tower that pairs with its text encoder")


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ("clap:x", "reward 'clap:x' must be 'clip:<folder or hub id>'"),
        ("clip:nowhere", "reward 'clip:nowhere': no such CLIP folder or hub id."),
        ("clip:/no/where", "no such CLIP folder or hub id."),
    ],
)
def test_a_reward_that_is_none(assert_refused, pipeline_folder, reward, says):
    assert_refused(pipeline_folder, says, reward=reward)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "lacks *.safetensors"),
        ("preprocessor_config.json", "lacks preprocessor_config.json"),
        ("tokenizer_config.json", "lacks tokenizer_config.json"),
    ],
)
def test_a_clip_folder_that_lacks_a_file(assert_refused, pipeline_folder, clip_folder, tmp_path, name, says):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    (folder / name).unlink()
    assert_refused(pipeline_folder, says, reward=f"clip:{folder}")


def test_a_folder_of_another_model(assert_refused, pipeline_folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert_refused(pipeline_folder, "holds a 'bert' model; a reward reads 'clip'", reward=f"clip:{tmp_path}")


def test_a_method_that_reads_no_reward(assert_refused, pipeline_folder):
    says = "'swiftbrush' reads no reward; leave reward='clip:a/b' out"
    assert_refused(pipeline_folder, says, "swiftbrush", reward="clip:a/b")


def test_a_clip_model_without_some_of_its_weights(clip_folder, pipeline_folder, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "visual_projection.weight"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights \(1, first 'visual_projection.weight'\)"):
        load_reward(f"clip:{folder}", load_teacher(pipeline_folder))


def test_a_loaded_teacher_without_a_tower(pipeline_folder):
    with pytest.raises(InputError, match="has no image tower"):
        check_reward("", load_teacher(pipeline_folder))

"""What a run cannot be is said before its teacher is loaded, whoever refuses it: the run, the method or the path."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import onestroke.teachers
from families import pipeline_of
from onestroke import InputError, distill
from onestroke.methods import METHODS, get_method
from onestroke.students.sample import sample
from onestroke.teachers import BUILT_IN
from onestroke.teachers.pipeline import files_sha256

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    """Let no teacher be loaded; called, from then on."""

    def forbid():
        for module in (onestroke.teachers, onestroke.students.sample):
            monkeypatch.setattr(module, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))

    forbid()
    return forbid


@pytest.fixture
def refused(pipeline_folder, prompt_file, tmp_path):
    """Assert that `distill` refuses a run, in these words."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "one.png")
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "a cat"}\n')

    def call(method, says, teacher=pipeline_folder, **given):
        source = {"images": tmp_path / "images"} if "x0" in get_method(method).needs else {"prompts": prompt_file}
        with pytest.raises(InputError, match=re.escape(says)):
            distill(str(teacher), method=method, out=tmp_path / "out", **source, **given)
        assert not (tmp_path / "out").exists()

    return call


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("hyper-sd", {"grid": 50}, "a grid of 50 steps has no 8 equal segments"),
        ("pcm", {"grid": 50, "student_steps": 4}, "a grid of 50 steps has no 4 equal segments"),
        ("mlcm", {"segments": 6}, "segments=6 must be the student's 1 step(s) doubled some times"),
        ("progressive", {"start": 6}, "start=6"),
        ("boss", {"solver_steps": 30, "student_steps": 4}, "solver_steps=30 must be a multiple of student_steps=4"),
        ("agd", {"solver_steps": 75}, "take a divisor of the teacher's times"),
        ("shortcut", {"grid": 100}, "grid=100 must be 2 doubled some times"),
        ("scm", {"velocity": "datum"}, "velocity 'datum'"),
        ("cd", {"scheme": "huen"}, "Did you mean 'heun'?"),
        ("boot", {"delta": 0.0}, "delta=0.0"),
        ("tdm", {"student_steps": 4, "renoise": "fresh"}, "renoise=implied"),
        ("tdm", {"student_steps": 3}, "renoise=implied needs a number of steps that divides 1000, not 3"),
        ("rectified-flow", {"student_steps": 4, "renoise": "fresh"}, "needs renoise=implied, not 'fresh'"),
        ("progressive", {"stage_steps": 50_000, "steps": 1000}, "begins after 350000 rounds, and the run has 1000"),
        ("progressive", {"steps": 3}, "begins after 7 rounds, and the run has 3; raise steps"),
        ("guided-distillation", {"guide_steps": 5000, "steps": 1000}, "the last phase of 'guided-distillation' begins"),
        ("slimflow", {"straighten": 5000, "steps": 1000}, "begins after 5000 rounds"),
        ("sida", {"steps": 700}, "begins after 780 rounds"),
        ("instaflow", {"straighten": 95_000, "steps": 1000}, "begins after 95000 rounds"),
        ("speedupnet", {"guide_steps": 5000, "steps": 1000}, "begins after 5000 rounds"),
        ("speedupnet", {"guidance_scale": 1.0}, "distils guidance, and guidance_scale=1 is none"),
        ("guided-distillation", {"guidance_scale": 1.0}, "distils guidance, and guidance_scale=1 is none"),
        ("agd", {"guidance_scale": 1.0}, "distils guidance, and guidance_scale=1 is none"),
        ("speedupnet", {"others": 7.0}, "others=7.0"),
        ("ct", {"sigma_min": 5.0, "sigma_max": 1.0}, "no noise level of the teacher's path is between 5.0 and 1.0"),
        ("ict", {"sigma_min": 3.0, "sigma_max": 2.0}, "no noise level of the teacher's path is between"),
        ("ict", {"stage_steps": -5}, "stage_steps=-5 counts something"),
        ("rectified-flow", {"lo": 0.9, "hi": 0.1}, "lo=0.9 and hi=0.1 must lie in [0, 1], lo below hi"),
        ("lcm", {"spread": 3.0, "embed": False}, "spread=3.0 must lie in [0, 1]"),
        ("guided-distillation", {"spread": -0.5}, "spread=-0.5 must lie in [0, 1]"),
    ],
)
def test_what_a_method_refuses(refused, method, given, says):
    refused(method, says, **given)


@pytest.mark.parametrize("method", sorted(name for name in METHODS if "x0" in get_method(name).needs))
def test_missing_pictures(pipeline_folder, prompt_file, tmp_path, method):
    with pytest.raises(InputError, match="needs real images with captions"):
        distill(str(pipeline_folder), method=method, out=tmp_path / "out", prompts=prompt_file)


def test_a_prediction_that_is_singular(refused, pipeline_folder, tmp_path):
    """Eps on betas rescaled to zero terminal SNR: at the noise end it says nothing of x0."""
    folder = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(config))
    refused("kd", "'eps' prediction is singular", folder)


def test_pairs_of_another_teacher(refused, pipeline_folder, prompt_file, tmp_path, monkeypatch, unloaded):
    """Told by its files: the network's, in whatever pieces they lie, the text encoder's and the noise levels; the same
    ones elsewhere are the same teacher."""
    monkeypatch.undo()
    distill(str(pipeline_folder), method="kd", out=tmp_path / "run", prompts=prompt_file, steps=1, batch_size=2)
    unloaded()
    others = other, reads, noise = [tmp_path / name for name in ("other", "reads", "noise")]
    same = tmp_path / "same"
    for folder in (*others, same):
        shutil.copytree(pipeline_folder, folder)
    encoder, schedule = reads / "text_encoder" / "model.safetensors", noise / "scheduler" / "scheduler_config.json"
    save_file({k: v + 1 for k, v in load_file(encoder).items()}, encoder, {"format": "pt"})
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.013}))
    weights = load_file(other / UNET)
    save_file({k: v + 1 for k, v in weights.items()}, other / UNET, {"format": "pt"})
    (same / UNET).unlink()
    for k, part in enumerate((dict(list(weights.items())[:5]), dict(list(weights.items())[5:]))):
        save_file(part, same / "unet" / f"{k}.safetensors", {"format": "pt"})
    assert files_sha256(same) == files_sha256(pipeline_folder)
    for folder in others:
        refused("kd", "holds the pairs of another teacher; give another", folder, pairs=tmp_path / "run" / "pairs")


def test_pairs_of_another_teacher_of_the_hub(
    refused, on_hub, pipeline_folder, prompt_file, tmp_path, monkeypatch, unloaded
):
    """By the files in the hub's cache; half-precision ones beside, which are not read, make no other teacher."""
    monkeypatch.undo()
    given = {"method": "kd", "prompts": prompt_file, "steps": 1, "batch_size": 2}
    distill(str(pipeline_folder), out=tmp_path / "run", **given)
    folder, pairs = shutil.copytree(pipeline_folder, on_hub("teacher")), tmp_path / "run" / "pairs"
    weights = load_file(folder / UNET)
    for variant in (".fp16", ".fp16-00001-of-00001"):
        file = folder / UNET.replace(".safetensors", f"{variant}.safetensors")
        save_file({k: v.half() for k, v in weights.items()}, file, {"format": "pt"})
    distill("org/teacher", out=tmp_path / "same", pairs=pairs, **given)
    save_file({k: v + 1 for k, v in weights.items()}, folder / UNET, {"format": "pt"})
    unloaded()
    refused("kd", "holds the pairs of another teacher; give another", "org/teacher", pairs=pairs)


def test_networks_of_the_hub(refused, on_hub, pipeline_folder):
    """By their configs: a transformer has no halves, and a UNet of one layer each has none to leave out."""
    shutil.copytree(BUILT_IN / "emoji64-flow", on_hub("flow"))
    shutil.copytree(pipeline_folder, on_hub("unet"))
    refused("tiue", "SD3Transformer2DModel has none; take a teacher with a UNet", "org/flow")
    refused("kd", "has no layer to leave out", "org/unet", layers=0.9)


def test_a_network_that_reads_its_guidance(refused, on_hub):
    """It is asked once, so that there is no second call to leave out."""
    folder = on_hub("flux")
    pipeline_of("flux-guided").save_pretrained(folder)
    says = "this network reads its guidance and needs no second call"
    for teacher in (folder, "org/flux"):
        refused("kd", says, teacher, guide="adaptive", guidance_scale=2.0)
        with pytest.raises(InputError, match=says):
            sample(teacher, ["a cat"], adaptive=True)


def test_a_run_that_is_cut_by_its_rounds(pipeline_folder, tmp_path, monkeypatch, unloaded):
    """Its stages would begin elsewhere; where their length is given, it goes on, to where the teacher is loaded."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "one.png")
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "a cat"}\n')

    def run(out, steps, resume=False, **options):
        distill(
            str(pipeline_folder), method="progressive", out=tmp_path / out, images=tmp_path / "images", start=2,
            batch_size=2, steps=steps, resume=resume, **options,
        )  # fmt: skip

    monkeypatch.undo()
    run("parts", 2)
    run("given", 2, stage_steps=1)
    unloaded()
    with pytest.raises(InputError, match="stage_steps was 1 and would be 2"):
        run("parts", 4, resume=True)
    with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
        run("given", 4, resume=True, stage_steps=1)

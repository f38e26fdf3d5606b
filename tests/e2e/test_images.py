"""Real pictures as the input of a run: both layouts, what is cached, what is refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import onestroke as library
from e2e.test_cli import assert_refusal, digest
from onestroke import methods
from onestroke.errors import InputError
from onestroke.images import open_image, read_images
from onestroke.run import read_prompts
from onestroke.teachers import BUILT_IN, load_teacher

REGRESS = '''
"""Regression onto real images, the smallest method that needs them."""
from onestroke import terms, times
from onestroke.method import Method, Turn

class Regress(Method):
    """Regress the student onto noised real images.

    A test's own."""
    players, needs, paper, passes = ("student",), frozenset({"x0"}), "none, arXiv 0000.00000", {"student": 1}

    def __init__(self, parts):
        super().__init__(parts)
        self.student, self.path = parts.student, parts.path

    def step(self, batch, step):
        t = times.uniform(batch.draw, self.path)
        yield Turn("student", {"dsm": terms.dsm(self.student, self.path, batch.x0, batch.cond, t, batch.draw)})
'''
CAPTIONS = {"one.png": "a red square", "two.jpg": "a blue circle", "deep/three.png": "rain"}


@pytest.fixture
def regress(tmp_path, monkeypatch):
    """A method that needs real images, as a file in a family folder."""
    family = tmp_path / "families" / "pictures"
    family.mkdir(parents=True)
    (family / "__init__.py").write_text("")
    (family / "regress.py").write_text(REGRESS)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(family.parent)])
    monkeypatch.setattr(methods, "METHODS", methods._files())
    yield "regress"
    for name in [n for n in sys.modules if n.startswith("onestroke.methods.pictures")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    """Three pictures of three sizes, one transparent, with a metadata.jsonl."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    Image.new("RGB", (32, 16), "red").save(root / "one.png")
    Image.new("RGB", (16, 16), "blue").save(root / "two.jpg")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(root / "deep" / "three.png")
    rows = [{"file_name": name, "text": f" {text}\n"} for name, text in CAPTIONS.items()]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def as_text(folder):
    """The same captions as text files."""
    (folder / "metadata.jsonl").unlink()
    for name, text in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n")


def words(teacher, method, folder, out, *more):
    small = ("--steps", "2", "--batch-size", "2", "--set", "log_with=none")
    return ["distill", teacher, "--method", method, "--images", folder, "--out", out, *small, *more]


def test_both_layouts_are_one(folder):
    one = read_images(folder)
    assert [str(p.relative_to(folder)) for p in one.files] == ["deep/three.png", "one.png", "two.jpg"]
    assert one.captions == ["rain", "a red square", "a blue circle"]
    as_text(folder)
    assert read_images(folder) == one
    (folder / "one.txt").write_text("a green square")
    assert read_images(folder).sha256 != one.sha256
    (folder / "one.txt").write_text("a red square")
    Image.new("RGB", (32, 16), "green").save(folder / "one.png")
    assert read_images(folder).sha256 != one.sha256


def test_a_picture_is_its_middle_on_white(folder, tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert torch.equal(open_image(tmp_path / "wide.png", (8, 8)), torch.ones(3, 8, 8))
    assert torch.equal(open_image(folder / "deep" / "three.png", (16, 8)), torch.ones(3, 16, 8))
    red = open_image(folder / "one.png", (4, 4))
    assert torch.equal(red, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 4, 4))


def test_a_run_on_pictures(onestroke, regress, folder, pipeline_folder, tmp_path):
    """Captions are the prompts; latents are kept and read again; other pictures are another run."""
    out, teacher = tmp_path / "run", load_teacher(pipeline_folder)
    said = onestroke(*words(pipeline_folder, regress, folder, out))
    assert (said.code, said.err) == (0, ""), said
    recipe, kept = json.loads((out / "recipe.json").read_text()), load_file(out / "images.safetensors")
    pictures = read_images(folder)
    assert (recipe["prompts"], recipe["images_sha256"]) == (3, pictures.sha256)
    for row, file in zip(kept["x0"], pictures.files, strict=True):
        image = open_image(file, (16, 16))[None]
        latents = teacher.pipeline.vae.encode(image * 2 - 1).latents[0]
        torch.testing.assert_close(row, latents * teacher.pipeline.vae.config.scaling_factor, rtol=1e-5, atol=1e-5)
    before = (out / "images.safetensors").stat().st_mtime_ns
    more = words(pipeline_folder, regress, folder, out, "--resume", "--steps", "3")
    assert onestroke(*more).code == 0
    assert (out / "images.safetensors").stat().st_mtime_ns == before
    Image.new("RGB", (32, 16), "green").save(folder / "one.png")
    assert_refusal(onestroke(*more), "holds another run: its images_sha256")


def test_a_method_without_need_of_images_takes_the_captions(onestroke, folder, pipeline_folder, tmp_path):
    out = tmp_path / "run"
    assert onestroke(*words(pipeline_folder, "swiftbrush", folder, out)).code == 0
    assert not (out / "images.safetensors").exists()
    assert json.loads((out / "recipe.json").read_text())["prompts"] == 3


def test_the_built_in_teacher_reads_pictures(regress, tmp_path):
    """What emoji64 draws, written as files: encoding regains the latents to what 8 bits and the autoencoder lose."""
    teacher, root = load_teacher("emoji64"), tmp_path / "pictures"
    root.mkdir()
    prompts = read_prompts(BUILT_IN / "emoji64" / "sheet.txt")[:4]
    noise = torch.randn(4, *teacher.shape, generator=torch.Generator().manual_seed(0))
    for k, image in enumerate(teacher.draw(noise, prompts, 10, 3.0)):
        pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{k}.png")
        (root / f"{k}.txt").write_text(prompts[k])
    student = library.distill(
        teacher, method=regress, images=root, out=tmp_path / "run", steps=1, batch_size=2, log_with="none"
    )
    assert student.card["method"] == regress
    x0 = load_file(tmp_path / "run" / "images.safetensors")["x0"]
    assert x0.shape == (4, *teacher.shape)
    images = torch.stack([open_image(p, teacher.size) for p in sorted(root.glob("*.png"))])
    assert (teacher.decode(x0) - images).square().mean() < 0.01 < images.var()


def test_the_autoencoders_scale_and_shift_are_undone(pipeline_folder):
    teacher = load_teacher(pipeline_folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain, factor = teacher.encode_images(images), teacher.pipeline.vae.config.scaling_factor
    drawn = teacher.decode(plain)
    teacher.pipeline.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    moved = teacher.encode_images(images)
    torch.testing.assert_close(moved, (plain / factor - 0.25) * 0.5)
    torch.testing.assert_close(teacher.decode(moved), drawn)
    with pytest.raises(InputError, match=r"must have \(16, 16\) pixels, not \(8, 8\)"):
        teacher.encode_images(images[:, :, :8, :8])


# ---- bad input -----------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def without_text(path):
    path.write_text(json.dumps({"file_name": "one.png"}) + "\n")


def one_row_less(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("one.png", lambda p: p.write_text("no picture"), ("one.png cannot be read as a picture",)),
        ("one.png", cut, ("one.png cannot be read as a picture",)),
        ("one.png", lambda p: p.unlink(), ("metadata.jsonl names one.png, which is no picture",)),
        ("metadata.jsonl", one_row_less, ("one.png has no caption; name it in metadata.jsonl",)),
        ("metadata.jsonl", lambda p: p.unlink(), ("deep/three.png has no caption",)),
        ("metadata.jsonl", without_text, ("metadata.jsonl, line 1: expected", "file_name")),
        ("metadata.jsonl", lambda p: p.write_text("[]\n"), ("metadata.jsonl, line 1: expected",)),
        ("metadata.jsonl", lambda p: p.write_bytes("caf\xe9".encode("latin-1")), ("is not UTF-8 (byte 3)",)),
        ("", lambda p: [f.unlink() for f in p.rglob("*.*")], ("holds no pictures (.bmp, .jpeg",)),
    ],
)
def test_bad_pictures(onestroke, regress, folder, pipeline_folder, tmp_path, file, harm, says):
    harm(folder / file)
    before = digest(tmp_path)
    assert_refusal(onestroke(*words(pipeline_folder, regress, folder, tmp_path / "run")), *says)
    assert digest(tmp_path) == before


def test_a_jpeg_that_breaks_off(onestroke, regress, folder, pipeline_folder, tmp_path):
    """Its header is whole, so that only decoding shows it."""
    Image.effect_noise((64, 64), 50).save(folder / "two.jpg")
    (folder / "two.jpg").write_bytes((folder / "two.jpg").read_bytes()[:-200])
    said = onestroke(*words(pipeline_folder, regress, folder, tmp_path / "run"))
    assert_refusal(said, "two.jpg cannot be read as a picture")
    assert not (tmp_path / "run").exists()


def test_prompts_or_images(onestroke, regress, folder, pipeline_folder, prompt_file, tmp_path):
    base = ["distill", pipeline_folder, "--method", regress, "--out", tmp_path / "run"]
    before = digest(tmp_path)
    assert_refusal(onestroke(*base), "give either --prompts, or --images")
    both = ("--prompts", prompt_file, "--images", folder)
    assert_refusal(onestroke(*base, *both), "give either --prompts, or --images")
    assert_refusal(onestroke(*base, "--prompts", prompt_file), "'regress' needs real images with captions", "--images")
    assert_refusal(onestroke(*base, "--images", tmp_path / "none"), "no such image folder")
    assert digest(tmp_path) == before

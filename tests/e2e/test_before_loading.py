"""What a run cannot be is said before its teacher is loaded, whoever refuses it: the run, the method or the path."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from PIL import Image

import onestroke.teachers
from onestroke import InputError, distill
from onestroke.methods import METHODS, get_method


@pytest.fixture(autouse=True)
def unloaded(monkeypatch):
    monkeypatch.setattr(onestroke.teachers, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))


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
        ("shortcut", {"grid": 100}, "grid=100 must be 2 doubled some times"),
        ("scm", {"velocity": "datum"}, "velocity 'datum'"),
        ("cd", {"scheme": "huen"}, "Did you mean 'heun'?"),
        ("boot", {"delta": 0.0}, "delta=0.0"),
        ("tdm", {"student_steps": 4, "renoise": "fresh"}, "renoise=implied"),
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

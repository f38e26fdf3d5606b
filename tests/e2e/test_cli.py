"""The commands a user types: what they write, and what they say of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file

from e2e.conftest import Said
from onestroke import load_teacher
from onestroke.denoiser import Guided
from onestroke.guidance import AdaptiveGuided
from onestroke.solvers import solve
from onestroke.students.student import SeededNoise, to_pil

UNET = "unet/diffusion_pytorch_model.safetensors"
SMALL = ("--steps", "2", "--batch-size", "2")


def shell(*words: object, cwd: Path) -> Said:
    """The installed command in a process of its own."""
    command = [str(Path(sys.executable).with_name("onestroke")), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ})
    return Said(done.returncode, done.stdout, done.stderr)


def digest(folder: Path) -> dict[str, str]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def assert_refusal(said: Said, *parts: str) -> None:
    assert said.code == 2, said
    assert said.err.startswith("error: "), said.err
    assert said.err.count("\n") == 1, said.err
    assert said.err.endswith("\n")
    for part in parts:
        assert part in said.err, said.err


def arguments(teacher: Path, prompts: Path, out: Path, *more: str) -> list[object]:
    return ["distill", teacher, "--method", "swiftbrush", "--prompts", prompts, "--out", out, *SMALL, *more]


@pytest.fixture(scope="session")
def finished(pipeline_folder, prompt_file, tmp_path_factory):
    """A run of two rounds, made once by the installed command. Copy it to change it."""
    folder = tmp_path_factory.mktemp("runs")
    said = shell(*arguments(pipeline_folder, prompt_file, Path("run")), cwd=folder)
    assert said == Said(0, said.out, ""), said
    assert said.out.splitlines()[-1] == "student: run"
    return folder / "run"


# ---- what the commands do ------------------------------------------------------------------------------------------


def test_distill_writes_a_student_and_its_recipe(finished, pipeline_folder):
    recipe, card = (json.loads((finished / name).read_text()) for name in ("recipe.json", "onestroke.json"))
    assert (recipe["method"], recipe["prompts"]) == ("swiftbrush", 6)
    assert recipe["options"] == {}
    assert (recipe["settings"]["steps"], recipe["settings"]["lr"]) == (2, {"student": 1e-6, "fake": 1e-3})
    assert (card["method"], card["teacher"], card["rounds"]) == ("swiftbrush", str(pipeline_folder), 2)
    assert card["student_steps"] == 1
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["00000002"]
    before, after = load_file(pipeline_folder / UNET), load_file(finished / UNET)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    names = digest(finished)
    assert not [n for n in names if Path(n).suffix in {".bin", ".pt", ".pkl", ".ckpt"}]
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        kept, given = load_file(finished / part), load_file(pipeline_folder / part)
        assert all(torch.equal(kept[k], given[k]) for k in given)


def test_sample_draws_one_row_per_prompt(finished, tmp_path):
    said = shell("sample", finished, "a cat", "rain", "-n", "3", "--seed", "5", "--out", "pictures.png", cwd=tmp_path)
    assert said == Said(0, "pictures: pictures.png\n", "")
    page = Image.open(tmp_path / "pictures.png")
    assert page.size == (3 * 16, 2 * 16)
    from onestroke import load_student

    student = load_student(finished)
    expected = student(["a cat"] * 3 + ["rain"] * 3, seed=5)
    for k, tile in enumerate(expected):
        x, y = k % 3 * 16, k // 3 * 16
        difference = torch.tensor(list(page.crop((x, y, x + 16, y + 16)).tobytes())) - torch.tensor(
            list(tile.tobytes())
        )
        assert difference.abs().max() <= 1


@pytest.mark.parametrize("adaptive", [False, True])
def test_sample_draws_with_a_solver(adaptive, onestroke, pipeline_folder, tmp_path):
    """By a solver of ours, from the noise of the seeds, under guidance that ends where it is told to."""
    more = ("--adaptive",) if adaptive else ("--solver", "deis-tab2")
    out = tmp_path / "teacher.png"
    said = onestroke("sample", pipeline_folder, "a cat", "rain", "--steps", "3", "--seed", "4", *more, "--out", out)
    assert (said.code, said.err) == (0, ""), said
    teacher = load_teacher(pipeline_folder)
    cond, noise = teacher.encode(["a cat", "rain"]), SeededNoise(2, 4).normal(teacher.shape)
    given = (teacher.net, 3.0, teacher.null)
    net = AdaptiveGuided(*given, space="x0") if adaptive else Guided(*given)
    solver = "dpm++2m" if adaptive else "deis-tab2"
    want = to_pil(teacher.decode(solve(net, teacher.path, noise, cond, 3, solver)))
    page = np.asarray(Image.open(out)).astype(int)
    assert np.abs(page - np.concatenate([np.asarray(image) for image in want]).astype(int)).max() <= 1


def test_a_student_takes_no_solver(assert_refused, finished, tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert_refused("sample", finished, "a cat", "--adaptive", *out, says=("go with a teacher",))
    assert_refused("sample", finished, "a cat", "--solver", "deis", *out, says=("go with a teacher",))
    assert_refused("sample", finished, "a cat", "--solver", "deas", *out, says=("unknown solver 'deas'",))


def test_sample_draws_with_a_teacher(onestroke, pipeline_folder, tmp_path):
    out = tmp_path / "new folder" / "teacher.png"
    assert onestroke("sample", pipeline_folder, "a cat", "--steps", "2", "--out", out) == Said(
        0, f"pictures: {out}\n", ""
    )
    assert Image.open(out).size == (16, 16)


def test_resume_continues_to_the_same_weights(onestroke, finished, pipeline_folder, prompt_file, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    shutil.copytree(finished, stopped)
    more = ("--steps", "4")
    for out, resume in ((stopped, ("--resume",)), (whole, ())):
        said = onestroke(*arguments(pipeline_folder, prompt_file, out), *more, *resume)
        assert (said.code, said.err) == (0, ""), said
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["00000004"]
    resumed, straight = load_file(stopped / UNET), load_file(whole / UNET)
    for key, value in straight.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=key)
    assert json.loads((stopped / "recipe.json").read_text())["settings"]["steps"] == 4


def test_a_student_begins_from_another(onestroke, finished, pipeline_folder, prompt_file, tmp_path):
    """At rate 0 it stays what it began as, which is not the teacher."""
    given = ("--set", f"init={finished}", "--set", "lr=0", "--set", "log_with=none")
    said = onestroke(*arguments(pipeline_folder, prompt_file, tmp_path / "run", *given))
    assert (said.code, said.err) == (0, ""), said
    first, second = load_file(finished / UNET), load_file(tmp_path / "run" / UNET)
    assert all(torch.equal(second[k], first[k]) for k in first)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["settings"]["init"] == str(finished)


def test_settings_reach_the_run(onestroke, pipeline_folder, prompt_file, tmp_path):
    given = ("--seed", "7", "--set", "lr.student=0.5", "--set", "lo=0.25", "--set", "ema=0", "--set", "log_with=none")
    assert onestroke(*arguments(pipeline_folder, prompt_file, tmp_path / "run", *given)).code == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["options"] == {"lo": 0.25}
    assert recipe["settings"]["lr"] == {"student": 0.5, "fake": 1e-3}
    assert (recipe["settings"]["seed"], recipe["settings"]["ema"]) == (7, 0.0)
    assert not (tmp_path / "run" / "log").exists()


def test_a_seed_may_be_given_as_a_setting(onestroke, pipeline_folder, prompt_file, tmp_path):
    out = tmp_path / "run"
    said = onestroke(*arguments(pipeline_folder, prompt_file, out, "--set", "seed=9", "--set", "log_with=none"))
    assert said.code == 0, said
    assert json.loads((out / "recipe.json").read_text())["settings"]["seed"] == 9


def test_methods_and_teachers_as_json(tmp_path):
    said = shell("methods", "--json", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    rows = {row["name"]: row for row in json.loads(said.out)}
    assert rows["swiftbrush"]["players"] == ["student", "fake"]
    assert rows["swiftbrush"]["needs"] == ["prompts"]
    ours = {"alpha_power": 2.0, "sigma_power": 2.0, "guide_fake": True}
    assert rows["swiftbrush"]["options"] == {"lo": 0.02, "hi": 0.98, "null_rate": 0.1, **ours}
    said = shell("teachers", "--json", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    from onestroke.teachers import built_in

    assert json.loads(said.out) == list(built_in().values())


def test_methods_and_teachers_as_text(onestroke):
    methods, teachers = onestroke("methods"), onestroke("teachers")
    assert methods.code == teachers.code == 0
    listed = " ".join(methods.out.split())
    for row in json.loads(onestroke("methods", "--json").out):
        assert f"{row['name']} {row['paper']}" in listed
    assert "needs prompts; one step; plays student, fake; extra memory: fake trained; 6 passes" in listed
    assert "plays student, heads; extra memory: heads trained; slow copied; 7 passes" in listed
    assert "teacher" in teachers.out


def test_a_method_is_checked_on_an_exact_teacher(onestroke):
    said = onestroke("methods", "--check", "sid", "--seconds", "2", "--case", "mixture, EDM, x0", "--json")
    assert said.code == 0, said
    found = json.loads(said.out)
    assert 0 < found["floor"] < found["start"]
    assert set(found["per_label"]) == {"0", "1", "2"}
    assert "pass" in (words := onestroke("methods", "--check", "sid", "--seconds", "1").out)
    assert "sid on ring, EDM, x0: sliced-W2" in words
    wrong = onestroke("methods", "--check", "sid", "--case", "ring")
    assert wrong.code == 2
    assert "unknown case 'ring'" in wrong.err


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def assert_refused(onestroke, pipeline_folder, prompt_file, tmp_path):
    """Call a command that must be refused, in a folder whose every file must stay as it was."""

    def call(*words: object, says: tuple[str, ...]) -> None:
        before = digest(tmp_path), digest(pipeline_folder), digest(prompt_file.parent)
        said = onestroke(*words)
        assert_refusal(said, *says)
        assert (digest(tmp_path), digest(pipeline_folder), digest(prompt_file.parent)) == before

    return call


def test_missing_teacher_in_a_shell(prompt_file, tmp_path):
    said = shell(*arguments(Path("nowhere"), prompt_file, Path("out")), cwd=tmp_path)
    assert_refusal(said, "unknown teacher", "'nowhere'")
    assert digest(tmp_path) == {}


def test_missing_hub_teacher(assert_refused, prompt_file, tmp_path):
    assert_refused(*arguments(Path("org/none"), prompt_file, tmp_path / "out"), says=("'org/none' could not be read",))


def test_teacher_that_is_a_file(assert_refused, prompt_file, tmp_path):
    assert_refused(*arguments(prompt_file, prompt_file, tmp_path / "out"), says=("is a file", "pipeline folder"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the prompt file is empty; give one prompt per line"),
        (b"\xef\xbb\xbf \n\t\n", "the prompt file is empty; give one prompt per line"),
        ("un caf\xe9\n".encode("latin-1"), "is not UTF-8 (byte 6); save it as UTF-8 text"),
        ("a cat\n".encode("utf-16"), "is not UTF-8 (byte 0); save it as UTF-8 text"),
        (None, "no such prompt file"),
    ],
)
def test_prompt_file(assert_refused, pipeline_folder, tmp_path, content, says):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert_refused(*arguments(pipeline_folder, path, tmp_path / "out"), says=(says,))


def test_unknown_method_names_the_nearest(assert_refused, pipeline_folder, prompt_file, tmp_path):
    words = ["distill", pipeline_folder, "--method", "swiftbrsh", "--prompts", prompt_file, "--out", tmp_path / "out"]
    assert_refused(*words, says=("unknown method 'swiftbrsh'", "Did you mean 'swiftbrush'?"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("guidance_scal=2", ("unknown setting 'guidance_scal'", "Did you mean 'guidance_scale'?")),
        ("nul_rate=0.2", ("unknown setting 'nul_rate'", "Did you mean 'null_rate'?")),
        ("lr.studnt=1e-5", ("player in setting 'lr' 'studnt'", "Did you mean 'student'?")),
        ("seed.student=1", ("setting seed=", "must be of type int")),
        ("ema=high", ("setting ema='high' must be of type float",)),
        ("lo=high", ("setting lo='high' must be of type float",)),
        ("warmup=2.5", ("setting warmup=2.5 must be of type int",)),
        ("shard=1", ("setting shard=1 must be of type bool",)),
        ("precision=fp64", ("setting precision='fp64' must be one of no, bf16, fp16",)),
        ("lora_targets=to_q", ("setting lora_targets='to_q' must be a list of str",)),
        ('lora_targets=["absent"]', ("none of the lora_targets ['absent']",)),
        ("ema=1", ("setting ema=1.0 must lie in [0, 1)",)),
        ("batch_size=0", ("setting batch_size=0 must be at least 1",)),
        ("clip=NaN", ("setting clip=nan must be finite and not negative",)),
        ("lr=-1", ("setting lr.*=-1.0 must be finite and not negative",)),
        ("betas=[0.9]", ("setting betas.*=[0.9] must be two numbers in [0, 1)",)),
        ("student_steps=4", ("'swiftbrush' trains at most 1 step(s), not 4",)),
        ("log_with=paper", ("log_with='paper'", "tensorboard")),
        ("clip", ("'clip' is not of the form key=value",)),
    ],
)
def test_setting(assert_refused, pipeline_folder, prompt_file, tmp_path, given, says):
    words = ["distill", pipeline_folder, "--method", "swiftbrush", "--prompts", prompt_file, "--out", tmp_path / "out"]
    assert_refused(*words, "--set", given, says=says)


def test_output_folder_that_holds_another_run(assert_refused, finished, pipeline_folder, prompt_file, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    words = arguments(pipeline_folder, prompt_file, out)
    assert_refused(*words, says=("is not empty", "another --out", "--resume"))
    said = shell(*words, cwd=tmp_path)
    assert_refusal(said, "is not empty")


def test_output_that_is_a_file_or_below_one(assert_refused, pipeline_folder, prompt_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(*arguments(pipeline_folder, prompt_file, tmp_path / "file"), says=("another --out",))
    assert_refused(
        *arguments(pipeline_folder, prompt_file, tmp_path / "file" / "out"), says=("is a file", "another --out")
    )


def test_what_no_student_begins_from(assert_refused, finished, pipeline_folder, prompt_file, tmp_path):
    def refused(*given, teacher=pipeline_folder, says):
        assert_refused(*arguments(teacher, prompt_file, tmp_path / "run", *given), says=says)

    refused("--set", "init=nowhere", says=("no such folder: nowhere",))
    refused("--set", f"init={pipeline_folder}", says=("is no student",))
    init = ("--set", f"init={finished}")
    refused(*init, "--set", "lora_rank.student=2", says=("leave init or lora_rank.student out",))
    refused(*init, "--set", "students=2", says=("leave init out",))
    other = tmp_path / "other"
    shutil.copytree(pipeline_folder, other)
    tensors = {k: v + 1 for k, v in load_file(other / UNET).items()}
    save_file(tensors, other / UNET, {"format": "pt"})
    refused(*init, teacher=other, says=("is a student of", "whose weights are others"))
    branch = tmp_path / "branch"
    shutil.copytree(finished, branch)
    (branch / "branch.safetensors").touch()
    refused("--set", f"init={branch}", says=("negative-prompt branch",))


def test_resume_of_a_different_run(assert_refused, finished, pipeline_folder, prompt_file, tmp_path):
    out, others = tmp_path / "run", tmp_path / "others.txt"
    shutil.copytree(finished, out)
    others.write_text("another prompt\n")
    teacher = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, teacher)
    same = (pipeline_folder, prompt_file, out, "--resume")
    assert_refused(*arguments(*same, "--seed", "3"), says=("holds another run: its setting seed is 0, not 3",))
    assert_refused(
        *arguments(*same, "--set", "lo=0.1"), says=("holds another run: its options is {}, not {'lo': 0.1}",)
    )
    assert_refused(*arguments(*same, "--set", "lr.fake=1e-4"), says=("holds another run: its setting lr",))
    assert_refused(
        *arguments(pipeline_folder, others, out, "--resume"), says=("holds another run: its prompts_sha256",)
    )
    assert_refused(*arguments(teacher, prompt_file, out, "--resume"), says=("holds another run: its teacher",))
    assert_refused(*arguments(pipeline_folder, prompt_file, tmp_path / "none", "--resume"), says=("no run to resume",))


# load, not load_file: a file that is mapped into memory must not be written.


def without_key(path: Path) -> None:
    tensors = load(path.read_bytes())
    tensors["not.a.key"] = tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


def other_shape(path: Path) -> None:
    tensors = load(path.read_bytes())
    key = min(tensors)
    tensors[key] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})


def as_pickle(path: Path) -> None:
    torch.save(load(path.read_bytes()), path)


def as_bin(path: Path) -> None:
    torch.save(load(path.read_bytes()), path.with_suffix(".bin"))
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def broken_json(path: Path) -> None:
    path.write_text(path.read_text()[:1])


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        ("student.safetensors", without_key, ("does not fit this run: 2 keys differ", "Resume with the method")),
        ("fake.safetensors", without_key, ("does not fit this run: 2 keys differ",)),
        ("average.safetensors", other_shape, ("has shape (3,), expected",)),
        ("fake.optim.safetensors", without_key, ("does not fit this run: 2 keys differ",)),
        ("student.safetensors", as_pickle, ("is not a safetensors file", "pickles are never read")),
        ("student.safetensors", cut, ("is not a safetensors file",)),
        ("fake.safetensors", Path.unlink, ("is missing",)),
        ("trainer.json", broken_json, ("trainer.json is not valid JSON",)),
        ("../../recipe.json", broken_json, ("recipe.json is not valid JSON",)),
        ("", shutil.rmtree, ("holds no checkpoint to resume",)),
    ],
)
def test_checkpoint(assert_refused, finished, pipeline_folder, prompt_file, tmp_path, file, harm, says):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    harm(out / "checkpoints" / "00000002" / file)
    assert_refused(*arguments(pipeline_folder, prompt_file, out, "--resume"), "--steps", "3", says=says)


def rename_class(path: Path) -> None:
    path.write_text(path.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))


def video_class(path: Path) -> None:
    path.write_text(path.read_text().replace("StableDiffusionPipeline", "LTXPipeline"))


def picture_class(path: Path) -> None:
    path.write_text(path.read_text().replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"))


def unknown_class(path: Path) -> None:
    path.write_text(path.read_text().replace("StableDiffusionPipeline", "PaintingPipeline"))


def own_code(path: Path) -> None:
    path.write_text(path.read_text().replace('"_class_name": "StableDiffusionPipeline"', '"_class_name": ["own", "P"]'))


def other_scheduler(path: Path) -> None:
    path.write_text(path.read_text().replace("DDIMScheduler", "EDMEulerScheduler"))


def other_prediction(path: Path) -> None:
    path.write_text(path.read_text().replace("v_prediction", "velocity"))


def epsilon(path: Path) -> None:
    path.write_text(path.read_text().replace("v_prediction", "epsilon"))


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        (UNET, as_bin, ("holds only diffusion_pytorch_model.bin, a pickle", "safe_serialization=True")),
        (UNET, as_pickle, ("is not a safetensors file", "pickles are never read")),
        (UNET, cut, ("is not a safetensors file",)),
        (UNET, Path.unlink, ("holds no weights", "safe_serialization=True")),
        (UNET, without_key, ("'unet' lacks weights (1, first 'conv_in.bias')",)),
        (UNET, other_shape, ("could not be read", "conv_in.bias")),
        ("vae/diffusion_pytorch_model.safetensors", without_key, ("'vae' lacks weights (1, first",)),
        ("text_encoder/model.safetensors", without_key, ("'text_encoder' lacks weights (1, first",)),
        ("text_encoder/model.safetensors", other_shape, ("could not be read",)),
        ("model_index.json", Path.unlink, ("is no diffusers pipeline: it has no model_index.json",)),
        ("model_index.json", broken_json, ("model_index.json is not valid JSON",)),
        ("model_index.json", rename_class, ("lacks the component 'transformer', which a FluxPipeline needs",)),
        ("model_index.json", video_class, ("is a LTXPipeline; onestroke reads text-to-image pipelines",)),
        ("model_index.json", picture_class, ("is a StableDiffusionImg2ImgPipeline; onestroke reads text-to-image",)),
        ("model_index.json", unknown_class, ("is a PaintingPipeline, which diffusers", "does not know")),
        ("model_index.json", own_code, ("is a ['own', 'P'], which diffusers", "does not know")),
        ("text_encoder", shutil.rmtree, ("lacks the component 'text_encoder'",)),
        ("vae", shutil.rmtree, ("lacks the component 'vae'",)),
        ("scheduler/scheduler_config.json", Path.unlink, ("scheduler_config.json is missing",)),
        ("scheduler/scheduler_config.json", other_prediction, ("predicts 'velocity'; onestroke reads epsilon",)),
        ("scheduler/scheduler_config.json", other_scheduler, ("has a EDMEulerScheduler; onestroke reads",)),
        ("scheduler/scheduler_config.json", epsilon, ("'eps' prediction is singular",)),
    ],
)
def test_teacher_folder(assert_refused, pipeline_folder, prompt_file, tmp_path, file, harm, says):
    teacher = tmp_path / "teacher"
    shutil.copytree(pipeline_folder, teacher)
    harm(teacher / file)
    assert_refused(*arguments(teacher, prompt_file, tmp_path / "out"), says=says)


def test_a_pickle_in_a_teacher_folder_is_never_run(onestroke, pipeline_folder, prompt_file, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        teacher = tmp_path / name
        shutil.copytree(pipeline_folder, teacher)
        (teacher / UNET).unlink()
        (teacher / "unet" / name).write_bytes(pickle.dumps(Bomb()))
        assert_refusal(onestroke(*arguments(teacher, prompt_file, tmp_path / "out")), "pickle")
        assert_refusal(onestroke("sample", teacher, "a cat", "--out", tmp_path / "x.png"), "pickle")
    assert not (tmp_path / "ran").exists()


def test_sample_into_an_existing_file(assert_refused, finished, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert_refused("sample", finished, "a cat", "--out", tmp_path / "mine.png", says=("exists; choose another --out",))
    assert_refused("sample", finished, "a cat", "--out", tmp_path, says=("exists; choose another --out",))


def test_sample_of_what_is_no_model(assert_refused, tmp_path):
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "x.png")
    assert_refused("sample", tmp_path / "none", "a cat", *out, says=("unknown teacher",))
    assert_refused("sample", tmp_path / "empty", "a cat", *out, says=("is no diffusers pipeline",))


def test_sample_in_no_steps(assert_refused, finished, tmp_path):
    assert_refused(
        "sample", finished, "a cat", "--steps", "0", "--out", tmp_path / "x.png", says=("must be at least 1",)
    )


def test_demo_into_a_folder_with_files(assert_refused, tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    assert_refused("demo", "--out", tmp_path / "demo", says=("is not empty; choose another --out",))


def test_steps_that_no_scheduler_takes(assert_refused, pipeline_folder, prompt_file, tmp_path):
    out = tmp_path / "out"
    words = ["distill", pipeline_folder, "--method", "few-step-sid", "--prompts", prompt_file, "--out", out]
    says = ("renoise=implied needs a number of steps that divides 1000, not 3",)
    assert_refused(*words, "--set", "student_steps=3", "--set", "renoise=implied", says=says)
    assert not out.exists()

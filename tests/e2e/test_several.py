"""Several students and the router between them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import onestroke as library
from conftest import PROMPTS
from onestroke.denoiser import Routed
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.paths import EDM, VP
from onestroke.sampling import FewStep
from onestroke.several import Router, cluster, route, summary
from onestroke.teachers import GaussianMixture, load_teacher
from onestroke.teachers.pipeline import PipelineTeacher

UNET = "unet/diffusion_pytorch_model.safetensors"
SMALL = {"method": "swiftbrush", "steps": 2, "batch_size": 2, "log_with": "none", "lr": 1e-2, "ema": 0.0}


@pytest.fixture(scope="module")
def clustered(pipeline_folder, tmp_path_factory):
    """Two students on two clusters of the prompts."""
    out = tmp_path_factory.mktemp("several") / "two"
    library.distill(str(pipeline_folder), prompts=PROMPTS, out=out, students=2, **SMALL)
    return out


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """A folder of two prompt files."""
    folder = tmp_path_factory.mktemp("shares")
    (folder / "a.txt").write_text("\n".join(PROMPTS[:4]) + "\n")
    (folder / "b.txt").write_text("\n".join(PROMPTS[4:]) + "\n")
    return folder


def conditions(*rows: list[float]) -> dict[str, Tensor]:
    return {"text": torch.tensor(rows)[:, None]}


# ---- the router ------------------------------------------------------------------------------------------------------


def test_every_condition_has_one_student():
    """Total and disjoint, against distances computed by numpy."""
    generator = torch.Generator().manual_seed(0)
    cond = {"text": torch.randn(5000, 4, 3, generator=generator)}
    router = route(cond, None, 5)
    owner = router(cond)
    rows, anchors = cond["text"].double().mean(1).numpy(), router.anchors.double().numpy()
    distance = np.linalg.norm(rows[:, None] - anchors[None], axis=2)
    nearest = np.sort(distance, axis=1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-5
    assert clear.mean() > 0.99
    assert (owner.numpy() == distance.argmin(1))[clear].all()
    assert set(owner.tolist()) == set(range(5))


def test_known_owners_are_kept():
    generator = torch.Generator().manual_seed(1)
    cond, owners = {"text": torch.randn(40, 4, 3, generator=generator)}, [k * 7 % 3 for k in range(40)]
    router = route(cond, owners, 3)
    assert router(cond).tolist() == owners
    near = {"text": cond["text"] + 1e-3 * torch.randn(40, 4, 3, generator=generator)}
    assert router(near).tolist() == owners


@pytest.mark.parametrize("count", [1, 2, 4])
def test_clusters_are_found(count):
    """Far apart: k-means finds each, whatever the seed, and its centroids are their means."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(60, 3, generator=generator) + 100 * torch.arange(count).repeat(60 // count)[:, None]
    for seed in range(5):
        found = cluster(rows, count, seed)
        want = torch.stack([rows[k::count].mean(0) for k in range(count)])
        torch.testing.assert_close(found[found[:, 0].argsort()], want, rtol=1e-5, atol=1e-4)


def test_a_centroid_is_the_mean_of_its_own_rows():
    rows = torch.randn(300, 4, generator=torch.Generator().manual_seed(3))
    found = cluster(rows, 6)
    owner = torch.cdist(rows, found).argmin(1)
    assert owner.bincount(minlength=6).min() > 0
    torch.testing.assert_close(found, torch.stack([rows[owner == k].mean(0) for k in range(6)]), rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_what_a_condition_says():
    text = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(4))
    text[1, 3:] = 0
    longer = torch.cat([text, torch.zeros(3, 2, 4)], 1)
    pooled, mask = torch.randn(3, 6), torch.ones(3, 5, dtype=torch.bool)
    got = summary({"text": text, "pooled": pooled, "mask": mask})
    assert torch.equal(got, summary({"text": longer, "pooled": pooled, "mask": mask}))
    torch.testing.assert_close(got[1], torch.cat([pooled[1], text[1, :3].mean(0)]))


# ---- several networks as one -----------------------------------------------------------------------------------------


class ByLabel(torch.nn.Module):
    """Label k to student k, all else to the first."""

    def forward(self, cond):
        return cond["label"].clamp_min(0)


@pytest.mark.parametrize("path", [VP(), EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize("steps", [1, 4])
def test_every_row_is_drawn_by_its_own_student(path, steps):
    """The law of the whole: each class is that of the teacher which knows this class alone."""
    laws = [GaussianMixture(path, torch.tensor([[m, -m]], dtype=torch.float64), 0.2, labels=[k])
            for k, m in enumerate((-2.0, 0.0, 3.0))]  # fmt: skip
    net, few = Routed(laws, ByLabel()), FewStep(path, path.grid(steps))
    label = torch.tensor([2, 0, 1, 1, 2, 0, 2])
    noise = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = few.sample(net, noise, {"label": label}, Draws(0, 0, 7))
    for k in range(3):
        alone = few.sample(laws[k], noise, {"label": torch.full((7,), k)}, Draws(0, 0, 7))
        torch.testing.assert_close(got[label == k], alone[label == k], rtol=1e-12, atol=1e-12)
    est = net(noise, torch.full((7,), 0.5, dtype=torch.float64), {"label": label})
    a, b = path.ab(torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(a * est.x0 + b * est.eps, noise, rtol=1e-10, atol=1e-10)


def test_one_student_behind_a_router_is_that_student():
    law = GaussianMixture(VP(), torch.eye(2, dtype=torch.float64), 0.3, labels=[0, 1])
    net = Routed([law], lambda cond: torch.zeros(len(cond["label"]), dtype=torch.int64))
    x, t, cond = torch.randn(5, 2).double(), torch.full((5,), 0.3, dtype=torch.float64), {"label": torch.arange(5) % 2}
    assert torch.equal(net(x, t, cond).x0, law(x, t, cond).x0)


# ---- runs ------------------------------------------------------------------------------------------------------------


def check_student(out, owner):
    """Drawn together, each prompt's picture is its own student's, seed by seed."""
    student = library.load_student(out)
    alone = [library.load_student(out / f"student-{k}") for k in range(max(owner) + 1)]
    pictures = student(PROMPTS, seed=3)
    for i, prompt in enumerate(PROMPTS):
        want = [np.asarray(s(prompt, seed=3 + i)[0]).astype(int) for s in alone]
        difference = [np.abs(np.asarray(pictures[i]).astype(int) - w).max() for w in want]
        assert difference[owner[i]] <= 1, (prompt, difference)
        assert max(difference) > 1, "the students draw the same: the test sees nothing"
    return student


def test_prompts_are_clustered_and_routed(clustered, pipeline_folder):
    recipe = json.loads((clustered / "recipe.json").read_text())
    assert (recipe["settings"]["students"], recipe["prompts"]) == (2, 6)
    found = load_file(clustered / "router.safetensors")
    router = Router(found["anchors"], found["owners"])
    owner = router(load_teacher(pipeline_folder).encode(PROMPTS)).tolist()
    student = check_student(clustered, owner)
    assert (student.card["students"], student.card["student_steps"]) == (2, 1)
    assert student.card["prompts"] == [owner.count(k) for k in range(2)]
    for k in range(2):
        own = json.loads((clustered / f"student-{k}" / "recipe.json").read_text())
        assert (own["prompts"], own["settings"]["students"]) == (owner.count(k), 1)
        assert json.loads((clustered / f"student-{k}" / "parity.json").read_text())["passed"]


def test_files_are_shares(shares, pipeline_folder, tmp_path):
    library.distill(str(pipeline_folder), prompts=shares, out=tmp_path / "run", **SMALL)
    student = check_student(tmp_path / "run", [0, 0, 0, 0, 1, 1])
    assert student.card["prompts"] == [4, 2]


def test_a_share_is_the_run_that_it_would_be_alone(clustered, pipeline_folder, tmp_path):
    found = load_file(clustered / "router.safetensors")
    owner = Router(found["anchors"], found["owners"])(load_teacher(pipeline_folder).encode(PROMPTS)).tolist()
    mine = [p for p, k in zip(PROMPTS, owner, strict=True) if k == 1]
    library.distill(str(pipeline_folder), prompts=mine, out=tmp_path / "alone", **SMALL)
    one, two = load_file(tmp_path / "alone" / UNET), load_file(clustered / "student-1" / UNET)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_that_broke_off_is_resumed(clustered, pipeline_folder, tmp_path):
    """The second student had not begun: the first is kept, the second made."""
    out = tmp_path / "run"
    shutil.copytree(clustered, out)
    shutil.rmtree(out / "student-1")
    for name in ("router.safetensors", "onestroke.json"):
        (out / name).unlink()
    with pytest.raises(InputError, match="no student, or its run has not finished"):
        library.load_student(out)
    library.distill(str(pipeline_folder), prompts=PROMPTS, out=out, students=2, resume=True, **SMALL)
    for k in range(2):
        one, two = load_file(out / f"student-{k}" / UNET), load_file(clustered / f"student-{k}" / UNET)
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_command_line_draws_with_them(clustered, onestroke, tmp_path):
    said = onestroke("sample", clustered, "rain", "a cat on a mat", "--out", tmp_path / "pictures.png")
    assert said.code == 0, said
    assert (tmp_path / "pictures.png").is_file()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def assert_refused(monkeypatch, pipeline_folder, tmp_path):
    """distill(...) must be refused before anything is loaded."""

    def never(*args, **kwargs):
        raise AssertionError("something heavy was loaded")

    monkeypatch.setattr(PipelineTeacher, "load", never)

    def call(says, **given):
        with pytest.raises(InputError, match=says):
            library.distill(str(pipeline_folder), out=tmp_path / "out", **SMALL | given)
        assert not (tmp_path / "out").exists()

    return call


def test_more_students_than_prompts(assert_refused):
    assert_refused("2 distinct prompts are too few for students=3", prompts=["a", "b", "a"], students=3)


def test_no_students(assert_refused):
    assert_refused("students=0 must be at least 1", prompts=PROMPTS, students=0)


def test_with_images_or_pairs_of_all(assert_refused, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("rain\n")
    for given in ({"images": tmp_path}, {"prompts": PROMPTS, "pairs": tmp_path / "pairs", "method": "instaflow"}):
        assert_refused("students=2 learn from --prompts alone", students=2, **given)


def test_a_folder_of_one_file(assert_refused, tmp_path):
    (tmp_path / "a.txt").write_text("rain\n")
    assert_refused(r"holds 1 prompt files \(\*\.txt\); give one per student", prompts=tmp_path)


def test_another_number_than_the_files(assert_refused, shares):
    for count in (1, 3):
        assert_refused(f"students={count}, and there are 2 prompt files", prompts=shares, students=count)


def test_a_prompt_in_two_files(assert_refused, shares, tmp_path):
    for file in shares.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "c.txt").write_text("snow\nrain\n")
    assert_refused("'rain' stands in b.txt and in c.txt", prompts=tmp_path)


def test_several_students_are_no_one_student(clustered, tmp_path):
    with pytest.raises(InputError, match=r"holds 2 students and a router; give one of them, .*student-0"):
        library.export(clustered, to="diffusers", out=tmp_path / "out")
    with pytest.raises(InputError, match="holds 2 students and a router"):
        library.merge([clustered, clustered / "student-0"], out=tmp_path / "out")


def test_a_router_that_is_none_or_of_others(clustered, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(clustered, out)
    (out / "router.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="is not the router of several students"):
        library.load_student(out)
    save_file({"anchors": torch.zeros(3, 16), "owners": torch.arange(3)}, out / "router.safetensors")
    with pytest.raises(InputError, match=r"names student 2, and .* knows 2"):
        library.load_student(out)

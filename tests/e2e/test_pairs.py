"""Pairs on disk: made by the teacher's solver, read by every method, and refused where they do not fit."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_pipeline
from e2e.test_cli import SMALL, UNET, assert_refusal, digest
from onestroke import load_student, load_teacher, pairs
from onestroke.denoiser import Guided, Told
from onestroke.guidance import AdaptiveGuided, fit_linear
from onestroke.method import Parts
from onestroke.pairs import fingerprint
from onestroke.paths import VP
from onestroke.sampling import FewStep
from onestroke.solvers import solve

WAYS = ("--set", "solver_steps=8", "--set", "guidance_scale=2", "--set", "pair_count=7")
SOLVE = ("--set", "solver_steps=3", "--set", "guidance_scale=2", "--set", "pair_count=7")


def words(teacher, prompts, out, method="kd", more=SOLVE):
    return ["distill", teacher, "--method", method, "--prompts", prompts, "--out", out, *SMALL, *more]


@pytest.fixture
def run(onestroke, pipeline_folder, prompt_file, tmp_path, monkeypatch):
    """A finished run of KD on 7 pairs of 6 prompts, 4 pairs to a file: (its folder, a caller of more)."""
    monkeypatch.setattr(pairs, "SHARD", 4)
    said = onestroke(*words(pipeline_folder, prompt_file, tmp_path / "run"))
    assert (said.code, said.err) == (0, ""), said

    def more(out, *given, teacher=pipeline_folder, prompts=prompt_file, **changes):
        return onestroke(*words(teacher, prompts, tmp_path / out, **changes), *given)

    return tmp_path / "run", more


def read(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {k: torch.cat([load_file(f)[k] for f in files]) for k in ("noise", "x0")}


def test_pairs_are_what_the_guided_solver_draws(run, pipeline_folder, prompt_file):
    folder, _ = run
    assert sorted(p.name for p in (folder / "pairs").iterdir()) == [
        "00000.safetensors",
        "00001.safetensors",
        "pairs.json",
    ]
    about = json.loads((folder / "pairs" / "pairs.json").read_text())
    assert (about["guidance_scale"], about["solver"], about["solver_steps"], about["seed"]) == (2.0, "dpm++2m", 3, 0)
    assert about["prompts_sha256"] == json.loads((folder / "recipe.json").read_text())["prompts_sha256"]
    found, teacher = read(folder / "pairs"), load_teacher(pipeline_folder)
    assert found["noise"].shape == (7, 4, 4, 4)
    assert len(found["noise"].flatten(1).unique(dim=0)) == 7
    assert 0.8 < found["noise"].std() < 1.2
    lines = prompt_file.read_text().split("\n")[:6]
    guided = Guided(teacher.net, 2.0, teacher.null)
    want = solve(guided, teacher.path, found["noise"], teacher.encode([*lines, lines[0]]), 3, "dpm++2m")
    torch.testing.assert_close(found["x0"], want, rtol=1e-4, atol=1e-4)
    before, after = load_file(pipeline_folder / UNET), load_file(folder / UNET)
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("guide", ["adaptive", "linear"])
def test_guidance_for_fewer_calls(guide, run, pipeline_folder, prompt_file, monkeypatch):
    """Their x0 is that of the solver under that guidance, and a run of full guidance takes other pairs."""
    folder, more = run
    how = ("--set", f"guide={guide}")
    monkeypatch.setattr(pairs, "FITTED", 7)
    said = more(guide, *how)
    assert (said.code, said.err) == (0, ""), said
    made = folder.parent / guide / "pairs"
    assert json.loads((made / "pairs.json").read_text())["guide"] == guide
    found, teacher, lines = read(made), load_teacher(pipeline_folder), prompt_file.read_text().split("\n")[:6]
    cond, given = teacher.encode([*lines, lines[0]]), (teacher.net, 2.0, teacher.null)
    if guide == "adaptive":
        net = AdaptiveGuided(*given, space="x0")
    else:
        with torch.no_grad():
            net = fit_linear(*given, found["noise"], cond, 3, "dpm++2m")
    want, full = (solve(n, teacher.path, found["noise"], cond, 3, "dpm++2m") for n in (net, Guided(*given)))
    torch.testing.assert_close(found["x0"], want, rtol=1e-4, atol=1e-4)
    assert (want - full).abs().max() > 1e-3
    before = digest(made)
    assert more("again", "--pairs", made, *how).code == 0
    assert digest(made) == before
    assert_refusal(more("other", "--pairs", made), f"their guide is '{guide}', not 'full'")


@pytest.mark.parametrize(
    ("method", "given", "says"),
    [
        ("kd", ("--set", "guidance_scale=1"), "has nothing to spare; set one above 1"),
        ("swiftbrush", (), "of pairs and ways, and this method needs none"),
        ("agd", (), "is of one guidance for all; set spread=0"),
        ("boss", (*WAYS, "--set", "guide=linear"), "set guide=adaptive, or leave it out"),
    ],
)
def test_guides_that_do_not_fit(method, given, says, onestroke, pipeline_folder, prompt_file, tmp_path):
    more = ("--set", "guidance_scale=2", "--set", "guide=adaptive", *given)
    assert_refusal(onestroke(*words(pipeline_folder, prompt_file, tmp_path / "run", method, more)), says)


def test_another_method_reads_them(run):
    folder, more = run
    before = digest(folder / "pairs")
    said = more("second", "--pairs", folder / "pairs", method="rectified-flow")
    assert (said.code, said.err) == (0, ""), said
    assert digest(folder / "pairs") == before
    assert not (folder.parent / "second" / "pairs").exists()


def test_what_is_missing_is_made_again_to_the_bit(run):
    folder, more = run
    before = digest(folder / "pairs")
    (folder / "pairs" / "00001.safetensors").unlink()
    cut = folder.parent / "cut"  # as a run that was cut off while it made pairs leaves it
    shutil.copytree(folder / "pairs", cut / "pairs")
    assert more("cut").code == 0
    assert digest(cut / "pairs") == before


def test_more_pairs_keep_the_noise_of_those_there_were(run):
    folder, more = run
    before = read(folder / "pairs")
    said = more("more", "--pairs", folder / "pairs", "--set", "pair_count=11")
    assert said.code == 0
    after = read(folder / "pairs")
    assert len(after["noise"]) == 11
    assert torch.equal(after["noise"][:7], before["noise"])
    torch.testing.assert_close(after["x0"][:7], before["x0"], rtol=1e-4, atol=1e-4)


def test_a_resumed_run_reads_its_own(run):
    folder, more = run
    before = digest(folder / "pairs")
    said = more("run", "--resume", "--steps", "4")
    assert (said.code, said.err) == (0, ""), said
    assert digest(folder / "pairs") == before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--set", "guidance_scale=3"), "holds other pairs: their guidance_scale is 2.0, not 3.0"),
        (("--set", "solver_steps=4"), "holds other pairs: their solver_steps is 3, not 4"),
        (("--set", "solver=ddim"), "holds other pairs: their solver is 'dpm++2m', not 'ddim'"),
        (("--seed", "1"), "holds other pairs: their seed is 0, not 1"),
        (("--set", "solver=dim"), "unknown solver 'dim'. Did you mean 'ddim'"),
    ],
)
def test_pairs_made_otherwise(run, given, says):
    folder, more = run
    assert_refusal(more("other", "--pairs", folder / "pairs", *given), says)
    assert not (folder.parent / "other").exists()


def test_pairs_of_another_teacher_or_other_prompts(run, tmp_path):
    folder, more = run
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "teacher")
    said = more("other", "--pairs", folder / "pairs", teacher=tmp_path / "teacher")
    assert_refusal(said, "holds the pairs of another teacher; give another --pairs")
    (tmp_path / "prompts").write_text("a fish\n")
    said = more("other", "--pairs", folder / "pairs", prompts=tmp_path / "prompts")
    assert_refusal(said, "holds other pairs: their prompts_sha256")


def test_the_last_bits_of_what_a_machine_computes_do_not_matter():
    path, net = VP(), torch.nn.Linear(3, 3)
    null = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))

    def of(text, bump=0.0):
        teacher = copy.deepcopy(net)
        with torch.no_grad():
            teacher.bias += bump
        return fingerprint(Parts(teacher, net, lambda role: net, FewStep(path), {"text": text}))

    assert of(null) == of(null + 1e-7 * torch.randn(1, 4, 8))
    assert len({of(null), of(null, 1e-6), of(2 * null), of(null[:, :3])}) == 4


def test_broken_pairs(run):
    folder, more = run
    file = folder / "pairs" / "00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert_refusal(more("other", "--pairs", folder / "pairs"), "00000.safetensors is broken", "delete it")
    save_file({"noise": torch.zeros(4, 4, 4, 2), "x0": torch.zeros(4, 4, 4, 2)}, file)
    assert_refusal(more("other", "--pairs", folder / "pairs"), "holds pairs of shape (4, 4, 2), not (4, 4, 4)")
    (folder / "pairs" / "pairs.json").write_text("{")
    assert_refusal(more("other", "--pairs", folder / "pairs"), "is not valid JSON")


def test_pairs_that_nobody_needs(run, prompt_file):
    _, more = run
    assert_refusal(more("other", "--pairs", prompt_file.parent, method="swiftbrush", more=()), "needs no pairs")
    assert_refusal(more("other", "--pairs", prompt_file), "is a file; give a folder of pairs")


# ---- ways ------------------------------------------------------------------------------------------------------------

READ = (*WAYS, "--set", "solver=ddim")


@pytest.fixture
def ways_run(onestroke, pipeline_folder, prompt_file, tmp_path, monkeypatch):
    """As `run`, of BOSS in two steps on 7 ways of 8 steps, 4 ways to a file."""
    monkeypatch.setattr(pairs, "WAYS", 4)
    two = (*WAYS, "--set", "student_steps=2", "--set", "search=1")
    said = onestroke(*words(pipeline_folder, prompt_file, tmp_path / "run", "boss", two))
    assert (said.code, said.err) == (0, ""), said

    def more(out, *given, teacher=pipeline_folder, **changes):
        read = (*READ, "--set", "search=1") if changes.get("method") == "boss" else READ
        return onestroke(*words(teacher, prompt_file, tmp_path / out, **{"more": read, **changes}), *given)

    return tmp_path / "run", more


def test_ways_are_what_the_guided_teacher_passes_through(ways_run, pipeline_folder, prompt_file):
    folder, _ = ways_run
    about = json.loads((folder / "pairs" / "pairs.json").read_text())
    assert (about["solver"], about["solver_steps"], about["guidance_scale"], about["ways"]) == ("ddim", 8, 2.0, True)
    files = [load_file(folder / "pairs" / f"0000{i}.safetensors") for i in range(2)]
    assert [len(file["states"]) for file in files] == [4, 3]
    found, teacher = read(folder / "pairs"), load_teacher(pipeline_folder)
    states = torch.cat([file["states"] for file in files])
    assert states.shape == (7, 9, 4, 4, 4)
    assert torch.equal(states[:, -1], found["x0"])
    torch.testing.assert_close(states[:, 0], found["noise"])  # of a path that preserves variance
    lines = prompt_file.read_text().split("\n")[:6]
    cond, guided = teacher.encode([*lines, lines[0]]), Guided(teacher.net, 2.0, teacher.null)
    x = found["noise"]
    for k in range(8):
        t, s = (torch.full((7,), (125 * (8 - i) - 1) / 999, dtype=torch.float64) for i in (k, k + 1))
        with torch.no_grad():
            est = guided(x, t, cond)
        x = teacher.path.mix(est.x0, est.eps, s) if k < 7 else est.x0
        torch.testing.assert_close(states[:, k + 1], x, rtol=1e-4, atol=1e-4)
    before, after = load_file(pipeline_folder / UNET), load_file(folder / UNET)
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_other_methods_read_ways_and_what_is_missing_of_them_is_made(ways_run):
    """KD, which needs their ends alone, makes the lacking file as the others are: AGD then reads them all."""
    folder, more = ways_run
    before, kept = digest(folder / "pairs"), folder / "pairs"
    (kept / "00001.safetensors").unlink()
    said = more("second", "--pairs", kept, method="kd")
    assert (said.code, said.err) == (0, ""), said
    assert digest(kept) == before
    said = more("third", "--pairs", kept, "--set", "student_steps=4", "--set", "spread=0", method="agd")
    assert (said.code, said.err) == (0, ""), said
    assert digest(kept) == before
    assert not (folder.parent / "third" / "pairs").exists()


def test_ways_have_a_guidance_of_their_own_each(ways_run, pipeline_folder, prompt_file):
    """Way i of the golden ratio's number i, as typed; those of one guidance are others, and for nobody else."""
    folder, more = ways_run
    assert_refusal(
        more("agd", "--pairs", folder / "pairs", "--set", "student_steps=4", method="agd"),
        "their spread is 0.0, not 1.0",
    )
    said = more("agd", "--set", "student_steps=4", "--set", "spread=0.5", "--set", "guidance_scale=3", method="agd")
    assert (said.code, said.err) == (0, ""), said
    kept, teacher = folder.parent / "agd" / "pairs", load_teacher(pipeline_folder)
    assert json.loads((kept / "pairs.json").read_text())["spread"] == 0.5
    files = [load_file(kept / f"0000{i}.safetensors") for i in range(2)]
    states = torch.cat([file["states"] for file in files])
    lines = prompt_file.read_text().split("\n")[:6]
    cond, t = teacher.encode([*lines, lines[0]]), torch.full((7,), 1.0, dtype=torch.float64)
    side = torch.tensor([2 * ((i + 0.5) * 0.6180339887498949 % 1) - 1 for i in range(7)])
    assert side.min() < -0.5 < 0.5 < side.max()
    with torch.no_grad():
        yes, no = (
            teacher.net(states[:, 0], t, c) for c in (cond, dict.fromkeys(cond, teacher.null["text"].expand(7, -1, -1)))
        )
    w = (1 + 2 * (1 + 0.5 * side)).float()[:, None, None, None]
    s = torch.full((7,), 874 / 999, dtype=torch.float64)
    first = teacher.path.mix(no.x0 + w * (yes.x0 - no.x0), no.eps + w * (yes.eps - no.eps), s)
    torch.testing.assert_close(states[:, 1], first, rtol=1e-4, atol=1e-4)
    assert_refusal(
        more("kd", "--pairs", kept, "--set", "guidance_scale=3", method="kd"), "their spread is 0.5, not 0.0"
    )
    student = load_student(folder.parent / "agd")
    assert student.told == Told(3.0, 1.0, 1.0)


def test_more_ways_keep_those_there_were(ways_run):
    folder, more = ways_run
    before = read(folder / "pairs")
    assert more("more", "--pairs", folder / "pairs", "--set", "pair_count=9", method="boss").code == 0
    after = read(folder / "pairs")
    assert len(after["noise"]) == 9
    assert torch.equal(after["noise"][:7], before["noise"])
    assert more("fewer", "--pairs", folder / "pairs", "--set", "pair_count=3", method="boss").code == 0


def test_pairs_are_no_ways(run):
    folder, more = run
    about = folder / "pairs" / "pairs.json"
    about.write_text(about.read_text().replace("dpm++2m", "ddim"))
    said = more("other", "--pairs", folder / "pairs", method="boss")
    assert_refusal(said, "holds pairs without the states between; give another --pairs")


def test_ways_that_do_not_fit(ways_run, tmp_path):
    folder, more = ways_run
    kept = folder / "pairs"
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "teacher")
    for given, says in (
        (("--pairs", kept, "--set", "solver_steps=10"), "holds other pairs: their solver_steps is 8, not 10"),
        (("--pairs", kept, "--set", "guidance_scale=3"), "holds other pairs: their guidance_scale is 2.0, not 3.0"),
        (("--set", "student_steps=3"), "solver_steps=8 must be a multiple of student_steps=3"),
        (("--set", "solver=dpm++2m"), "the teacher's ways are of DDIM steps; set solver=ddim instead of dpm++2m"),
        (("--set", "solver_steps=12"), "take a divisor of the teacher's times"),
    ):
        assert_refusal(more("other", *given, method="boss"), says)
    other = more("other", "--pairs", kept, teacher=tmp_path / "teacher", method="boss")
    assert_refusal(other, "holds the pairs of another teacher; give another --pairs")
    held = load_file(kept / "00000.safetensors")
    save_file(held | {"states": held["states"][:, :5].clone()}, kept / "00000.safetensors")
    assert_refusal(more("other", "--pairs", kept, method="boss"), "holds pairs of shape (5, 4, 4, 4), not (9, 4, 4, 4)")
    save_file({k: v for k, v in held.items() if k != "states"}, kept / "00000.safetensors")
    assert_refusal(more("other", "--pairs", kept, method="boss"), "00000.safetensors is broken", "delete it")

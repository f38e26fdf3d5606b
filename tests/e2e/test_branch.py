"""SpeedUpNet's negative-prompt branch: by its closed form, in training on real networks, and beside a pipeline."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

import onestroke as library
from conftest import PROMPTS
from contract.build import settings_of
from e2e.test_control import control_of, gap
from e2e.test_nasa import OneLayer, heads, joined, told, weights
from onestroke.denoiser import PREFIX, SCALE, negated
from onestroke.draws import Draws
from onestroke.errors import InputError
from onestroke.methods.guidance.speedupnet import SpeedUpNet
from onestroke.run import parts_of
from onestroke.students.parity import open_plain
from onestroke.students.student import load_student, save_student
from onestroke.teachers import branch as source
from onestroke.teachers.branch import BRANCH, branched, cross_attentions, read_branch, save_branch
from onestroke.teachers.calls import Call
from onestroke.teachers.nasa import negative_prompt, steered
from onestroke.teachers.pipeline import PipelineTeacher
from onestroke.training.train import Data, Trainer
from truth.checks import turns_of
from truth.test_mutants import broken

UNETS, CROSS, OTHERS = ("sd15", "sd21", "sdxl"), ("sana", "pixart-alpha"), ("sd3", "flux", "lumina2")
METHOD = "onestroke.methods.guidance.speedupnet"
W = 4.0
AWAY = ["an old oak", "rain"]


# ---- the closed form -------------------------------------------------------------------------------------------------


def is_its_formula(module):
    """h = A(q, K, V) - g [a N(A(q, K_n, V_n)) + b], typed by hand; N by the norms of each picture."""
    torch.manual_seed(0)
    attn = Attention(query_dim=6, cross_attention_dim=3, heads=2, dim_head=4, bias=True)
    net, picture, text, away = OneLayer(attn), torch.randn(2, 7, 6), torch.randn(2, 5, 3), torch.randn(2, 3, 3)
    branch = module.Branch(net, {"text": torch.randn(1, 4, 3)}, 0.7)
    own, base = branch.layers["attn"], copy.deepcopy(attn)
    for name in ("to_k", "to_v"):
        for kind in ("weight", "bias"):
            assert torch.equal(getattr(getattr(own, name), kind), getattr(getattr(attn, name), kind))
    assert (own.a == 1).all()
    assert (own.b == 0).all()

    def found(cond):
        with steered(net, Call(), cond, branch), torch.no_grad():
            return net(picture, torch.zeros(2), encoder_hidden_states=text)[0]

    def wanted(away, scale):
        plus = joined(weights(base.to_q(picture), base.to_k(text)) @ heads(base.to_v(text)))
        minus = joined(weights(base.to_q(picture), own.to_k(away)) @ heads(own.to_v(away)))
        for row in range(2):
            minus[row] *= (plus[row].square().sum() / minus[row].square().sum()).sqrt()
        return base.to_out[0](plus - scale * (own.a * minus + own.b))

    with torch.no_grad():
        assert torch.allclose(found(told(text, away, 0.3)), wanted(away, 0.3), atol=1e-5)
        for p in own.parameters():
            p.add_(torch.randn_like(p))
        assert torch.allclose(found(told(text, away, 0.3)), wanted(away, 0.3), atol=1e-5)
        assert torch.allclose(found({}), wanted(branch.text.expand(2, -1, -1), 0.7), atol=1e-5)
        assert torch.allclose(found({PREFIX + "text": away}), wanted(away, 0.7), atol=1e-5)


def test_it_is_its_formula():
    is_its_formula(source)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("goal / size", "size / goal"),
        ("vector_norm(z, dim=(1, 2)", "vector_norm(z, dim=(0, 1, 2)"),
        ("vector_norm(away, dim=(1, 2)", "vector_norm(away, dim=(2,)"),
        ("+ self.b)", ")"),
        ("(self.a * (away", "((away"),
        ("layer.to_k, layer.to_v = self.to_k, self.to_v", "layer.to_v = self.to_v"),
        ("layer.to_k, layer.to_v = own", "pass"),
        ("SCALE: self.scale, **cond}", "SCALE: self.scale, **cond, PREFIX + 'text': self.text}"),
    ],
)
def test_the_check_fails_on_the_mutant(old, new):
    with pytest.raises(AssertionError):
        is_its_formula(broken("onestroke.teachers.branch", old, new))


# ---- networks --------------------------------------------------------------------------------------------------------


def drawn(net, teacher, cond):
    torch.manual_seed(1)
    noise, t = torch.randn(len(cond["text"]), *teacher.shape), torch.full((len(cond["text"]),), 0.7).double()
    return net(noise, t, cond).x0


@pytest.mark.parametrize("name", UNETS + CROSS)
def test_without_scale_it_is_the_network(name, teachers):
    teacher = teachers[name]
    cond, away, net = teacher.encode(PROMPTS[:2]), teacher.encode(AWAY), branched(teacher.net, teacher.null, W)
    with torch.no_grad():
        before = drawn(teacher.net, teacher, cond)
        assert torch.equal(drawn(net, teacher, {**negated(cond, away, None), SCALE: torch.zeros(2)}), before)
        assert (drawn(net, teacher, negated(cond, away, None)) - before).abs().max() > 1e-5
        default = drawn(net, teacher, negated(cond, teacher.null, (W - 1) / W))
        assert torch.equal(drawn(net, teacher, cond), default)
        one = drawn(net, teacher, negated(cond, teacher.encode(AWAY[:1]), None))
        assert torch.allclose(drawn(net, teacher, negated(cond, away, None))[0], one[0], atol=1e-5)
        assert torch.equal(drawn(teacher.net, teacher, cond), before)


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_left_to_the_role(name, teachers):
    parts = parts_of(teachers[name], settings_of(guidance_scale=W, lora_rank={"student": 2}))
    assert SpeedUpNet(parts).student is parts.student


def training(teacher, prompts=PROMPTS, cls=SpeedUpNet, folder=None, options=None, **changes):
    how = {"guidance_scale": W, "lora_rank": {"student": 2}, "student_steps": 2, "renoise": "implied"}
    run = settings_of(**how | changes)
    cond = teacher.conditions(prompts)
    method = cls(parts_of(teacher, run, None, None, cond), **{"pieces": 2, **(options or {})})
    x0 = torch.randn(len(prompts), *teacher.shape, generator=torch.Generator().manual_seed(0))
    return Trainer(method, Data(teacher.shape, cond, x0), run, folder)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sana"])
def test_gradient_reaches_the_branch_alone(name, teachers):
    trainer = training(teachers[name], options={"guide_steps": 1})
    method = trainer.method
    for step in (0, 1):
        for turn in turns_of(method, trainer.batches(step)[0], step):
            sum(turn.terms.values()).backward()
        for key, p in method.named_parameters():
            own = key.startswith("student.branch.")
            assert p.requires_grad == own
            assert (p.grad is not None and bool((p.grad != 0).any())) == own, key
        method.zero_grad(set_to_none=True)


def negatives_are_what_both_read(cls, teacher):
    """The student reads the text that the teacher is guided away from: the null condition, or another prompt's."""
    cond, null = teacher.conditions(PROMPTS), teacher.null["text"][0]
    for others, step in ((0.0, 0), (1.0, 0), (0.0, 1), (1.0, 1), (0.5, 0)):
        trainer, seen, asked = training(teacher, cls=cls, options={"others": others, "guide_steps": 1}), [], []
        method = trainer.method
        method.student.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[2]))
        method.teacher.register_forward_pre_hook(lambda _, args, asked=asked: asked.append(args[2]))
        batch = trainer.data.batch(Draws(0, step, 16), torch.device("cpu"))
        list(turns_of(method, batch, step))
        for given in seen:
            away = given[PREFIX + "text"]
            assert all(torch.equal(a["text"].chunk(2)[1], away) for a in asked)
            assert torch.equal(given["text"], batch.cond["text"])
            empty = [torch.equal(row, null) for row in away]
            assert others == (0.5 if 0 < sum(empty) < 16 else 1 - sum(empty) / 16)
            which = {next(i for i, c in enumerate(cond["text"]) if torch.equal(c, row)) for row in away if others == 1}
            assert len(which) > 2 or others < 1
        assert len(seen) == 1 + step
        assert asked


def test_negatives_are_what_both_read(teachers):
    negatives_are_what_both_read(SpeedUpNet, teachers["sd15"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("told = negated(cond, null, None)", "pass"),
        ("Guided(self.teacher, self.scale, null)", "Guided(self.teacher, self.scale, self.null)"),
        (">= self.others", "< self.others"),
        ("clamp_min(path.t_min), told)", "clamp_min(path.t_min), cond)"),
        ("truncated_snr(self.student(x, t, told)", "truncated_snr(self.student(x, t, cond)"),
    ],
)
def test_the_negatives_check_fails_on_the_mutant(old, new, teachers):
    with pytest.raises((AssertionError, KeyError)):
        negatives_are_what_both_read(broken(METHOD, old, new).SpeedUpNet, teachers["sd15"])


def test_the_default_is_the_option(teachers):
    """What a student draws away from unless told otherwise, and how much; and none of it where it is not wanted."""
    teacher = teachers["sd15"]
    branch = training(teacher, options={"negative": "rain"}).method.student.branch
    assert torch.equal(branch.text, teacher.encode(["rain"])["text"])
    assert branch.scale.item() == pytest.approx((W - 1) / W)
    method = training(teacher, options={"branch": False}).method
    assert method.student.branch is None
    assert any("lora" in k for k, p in method.student.named_parameters() if p.requires_grad)


def test_rows_do_not_depend_on_the_split(teachers):
    trainer = training(teachers["sd15"], options={"guide_steps": 1})

    def loss(size, offset, step):
        batch = trainer.data.batch(Draws(0, step, size, offset, 8), torch.device("cpu"))
        (turn,) = trainer.method.step(batch, step)
        return sum(turn.terms.values()).item()

    for step in (0, 1):
        assert (loss(4, 0, step) + loss(4, 4, step)) / 2 == pytest.approx(loss(8, 0, step), rel=1e-4)


def lively(teacher, factor: float):
    """The teacher with its text weighing more: of random weights it says next to nothing."""
    found = copy.copy(teacher)
    found.net = copy.deepcopy(teacher.net)
    with torch.no_grad():
        for layer in cross_attentions(getattr(found.net, teacher.part)).values():
            for part in (layer.to_k, layer.to_v, layer.to_out[0]):
                part.weight.mul_(factor)
    return found


@pytest.mark.parametrize("name", UNETS)
def test_training_takes_guidance_in(name, teachers):
    """A few rounds, and on other draws the guidance loss is far below the first and below that of the teacher without
    guidance; the negative prompt, also one that was never seen, shows in the picture."""
    teacher = lively(teachers[name], 3.0)
    before, how = copy.deepcopy(teacher.net.state_dict()), {"warmup": 0, "decay": "constant", "weight_decay": 0.0}
    trainer = training(teacher, options={"guide_steps": 60}, guidance_scale=1.5, batch_size=8, ema=0.0, **how)

    def loss(student):
        trainer.method.student, kept = student, trainer.method.student
        with torch.no_grad():
            (turn,) = trainer.method.step(trainer.data.batch(Draws(1, 0, 64), torch.device("cpu")), 0)
        trainer.method.student = kept
        return turn.terms["guide"].item()

    first, unguided = loss(trainer.method.student), loss(teacher.net.eval())
    for _ in range(30):
        trainer.one_round(0.0)
    last = loss(trainer.method.student)
    net, cond = trainer.finish(), teacher.encode(PROMPTS[:2])
    with torch.no_grad():
        plain, told = (drawn(net, teacher, negated(cond, teacher.encode([x]), None)) for x in ("rain", "blue sky"))
    assert last < 0.85 * first
    assert last < unguided
    assert (told - plain).abs().max() > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in teacher.net.state_dict().items())


def test_stop_and_resume_is_bit_equal(teachers, tmp_path):
    def rounds(folder, upto, resume=False):
        trainer = training(teachers["sd15"], folder=folder, options={"guide_steps": 2})
        if resume:
            trainer.resume()
        while trainer.round < upto:
            trainer.one_round(trainer.round / 4)
        trainer.save()
        return trainer.finish().state_dict()

    straight = rounds(tmp_path / "a", 4)
    rounds(tmp_path / "b", 2)
    resumed = rounds(tmp_path / "b", 4, resume=True)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(v, straight[k]) for k, v in resumed.items())


# ---- students --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sana"])
def test_what_is_saved_is_what_is_read(name, teachers, tmp_path):
    """A student is written, read and called with negative prompts: the same bits; the pipeline is the teacher's own."""
    teacher = lively(teachers[name], 8.0)
    trainer = training(teacher)
    for _ in range(2):
        trainer.one_round(0.0)
    net, few = trainer.finish(), parts_of(teacher, trainer.settings).few
    save_student(teacher, net, few, tmp_path / "student", {"teacher": name, "method": "speedupnet"})
    student, cond = load_student(tmp_path / "student"), teacher.encode(PROMPTS[:2])
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in student.model.net.state_dict().items())
    assert not any(p.requires_grad for p in student.model.net.parameters())
    with torch.no_grad():
        for given in (cond, negated(cond, teacher.encode(AWAY), None)):
            assert torch.equal(drawn(student.model.net, teacher, given), drawn(net, teacher, given))
    if name == "sd15":
        controlled = student.with_controlnet(control_of(teacher, False))
        assert gap(controlled(PROMPTS[:2], Image.new("RGB", (16, 16))), student(PROMPTS[:2])) <= 1
    plain = open_plain(tmp_path / "student")
    theirs = getattr(plain, teacher.part).state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in getattr(teacher.net, teacher.part).state_dict().items())
    pictures = [student(PROMPTS[:2], negative_prompt=text)[0].tobytes() for text in ("", "blue sky", "rain")]
    assert len(set(pictures)) == 3

    def far(ours):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return gap(plain(PROMPTS[:2], generator=generators, **student.card["call"]).images, ours)

    plain.set_progress_bar_config(disable=True)
    ours = student(PROMPTS[:2], negative_prompt="blue sky")
    file = tmp_path / "student" / BRANCH
    with negative_prompt(plain, "blue sky", size=student.model.size, branch=file):
        assert far(ours) <= 1
    assert far(ours) > 1
    with torch.no_grad():  # a fine-tune of the base
        for p in getattr(plain, teacher.part).parameters():
            p.mul_(1.01)
    with negative_prompt(plain, "blue sky", size=student.model.size, branch=file):
        assert far(ours) > 0


@pytest.fixture(scope="module")
def student(pipeline_folder, tmp_path_factory):
    """The folder of a student that was distilled from pictures."""
    root = tmp_path_factory.mktemp("branch")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(PROMPTS[:4]):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(prompt)
    how = {"steps": 3, "batch_size": 2, "pieces": 2, "guide_steps": 2, "log_with": "none"}
    library.distill(str(pipeline_folder), method="speedupnet", images=root / "pictures", out=root / "out", **how)
    return root / "out"


def test_a_run_says_what_plain_diffusers_draws(student, onestroke, tmp_path):
    parity, page = json.loads((student / "parity.json").read_text()), (student / "README.md").read_text()
    assert parity["passed"]
    assert parity["without_branch"]["latents"] > 10 * parity["max_abs_difference"]["latents"]
    assert "Without it latents differ" in page
    assert f'branch="path/to/out/{BRANCH}"' in page
    for i, more in enumerate([(), ("--negative", "rain"), ("--negative", "rain", "--nasa-scale", 0.1)]):
        assert onestroke("sample", student, "a cat", *more, "--out", tmp_path / f"{i}.png").code == 0
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(3)}) == 3


def test_what_becomes_of_it(student, tmp_path):
    out = library.export(student, to="diffusers", out=tmp_path / "half", dtype="float16")
    assert json.loads((out / "parity.json").read_text())["passed"]
    assert load_student(out).model.net.branch is not None
    merged = library.merge([student, student], out=tmp_path / "merged")
    ours, theirs = (s(["rain"], negative_prompt="a cat")[0].tobytes() for s in (merged, load_student(student)))
    assert ours == theirs
    for to in ("lora", "onnx"):
        with pytest.raises(InputError, match="negative-prompt branch, which"):
            library.export(student, to=to, out=tmp_path / to)
    with pytest.raises(InputError, match="without compile"):
        load_student(student, compile=True)


def test_gradient_checkpointing_is_refused_before_anything_is_loaded(pipeline_folder, tmp_path, monkeypatch):
    """And let alone where no branch is asked for."""
    monkeypatch.setattr(PipelineTeacher, "load", lambda *args, **more: pytest.fail("the teacher was loaded"))
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    given = {"method": "speedupnet", "images": tmp_path, "out": tmp_path / "out", "gradient_checkpointing": True}
    with pytest.raises(InputError, match="a negative-prompt branch goes without gradient_checkpointing"):
        library.distill(str(pipeline_folder), **given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
        library.distill(str(pipeline_folder), **given, branch=False)
    assert SpeedUpNet.needs_of({"branch": True}) == SpeedUpNet.needs


def test_what_is_refused(student, teachers, tmp_path):
    unet = PipelineTeacher.load(student).net.unet
    other = copy.deepcopy(unet)
    other.mid_block = None
    narrow = teachers["sd21"].net.unet
    (tmp_path / "text").write_text("nothing")
    for file, network, says in (
        (tmp_path / "text", unet, "is not a safetensors file"),
        (student / "vae" / "diffusion_pytorch_model.safetensors", unet, "holds no negative-prompt branch"),
        (student / BRANCH, narrow, "is the branch of another base"),
        (student / BRANCH, other, "is the branch of another base"),
        (student / BRANCH, teachers["sd3"].net.transformer, "has no cross-attention"),
    ):
        with pytest.raises(InputError, match=says):
            read_branch(file, network)
    with pytest.raises(InputError, match="needs one above 1"):
        branched(teachers["sd15"].net, teachers["sd15"].null, 1.0)
    save_branch(teachers["sd15"].net, tmp_path)
    assert not (tmp_path / BRANCH).exists()

"""Students with fewer layers than their teacher: what they keep, that they draw by plain diffusers, what is refused."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import onestroke
from conftest import PROMPTS, tiny_pipeline
from contract.build import PHASES, at_once
from e2e.test_families import check_parity
from families import FAMILIES, pipeline_of
from onestroke.denoiser import kept_of, plain, spaced
from onestroke.errors import InputError
from onestroke.method import Pairs, Parts
from onestroke.methods import METHODS, get_method, options
from onestroke.paths import VP
from onestroke.plan import NO_PICTURES, plan
from onestroke.run import parts_of, plan_run
from onestroke.sampling import FewStep
from onestroke.settings import Settings
from onestroke.students.student import SeededNoise, load_student, save_student
from onestroke.teachers import GaussianMixture
from onestroke.teachers.pipeline import PipelineTeacher
from onestroke.training.roles import make_role
from onestroke.training.train import Data, Trainer
from onestroke.truth import Net

UNET = {"layers_per_block": 3, "transformer_layers_per_block": 2}
DEEP = {
    **dict.fromkeys(("sd15", "sd21", "sdxl"), UNET),
    "sd3": {"num_layers": 5, "dual_attention_layers": (0, 1, 2)},
    **{name: {"num_layers": 5, "num_single_layers": 5} for name in ("flux", "flux-guided")},
    "z-image": {"n_layers": 5},
}
PART = (
    0.6  # 3 of 5 blocks; 2 of 3 residual layers on the way down, 3 of 4 on the way up; 1 of 2 layers of a transformer
)
KEPT = {  # where the student's layer of a number stands in the teacher
    r"down_blocks\.\d+\.(?:resnets|attentions)": (0, 2),
    r"up_blocks\.\d+\.(?:resnets|attentions)": (0, 1, 3),
    r"(?:down_blocks|up_blocks|mid_block)\.[\w.]+\.transformer_blocks": (0,),
    r"(?:transformer_blocks|single_transformer_blocks|layers)": (0, 2, 4),
}
SHORT = {"method": "slimflow", "steps": 2, "straighten": 1, "batch_size": 2, "solver_steps": 2, "log_with": "none"}
every = pytest.mark.parametrize("name", FAMILIES)


def deep(name: str) -> PipelineTeacher:
    """The tiny teacher of a family with more layers; no two of its tensors are the same."""
    pipeline = pipeline_of(name)
    part = "unet" if "unet" in pipeline.components else "transformer"
    network = getattr(pipeline, part)
    more = DEEP.get(name, {"num_layers": 5})
    network = type(network).from_config({**network.config, **more})
    generator = torch.Generator().manual_seed(2)
    for p in network.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    pipeline.register_modules(**{part: network})
    return PipelineTeacher(pipeline, name, size=FAMILIES[name].size)


def student_of(teacher: PipelineTeacher, layers: float = PART):
    return make_role(teacher.net, "student", Settings(layers=layers))


def in_teacher(name: str, kept=KEPT) -> str:
    """The name in the teacher of a tensor of the student."""
    for stack, places in kept.items():
        if found := re.match(rf"(\w+\.{stack})\.(\d+)\.", name):
            name = f"{found[1]}.{places[int(found[2])]}.{name[found.end() :]}"
    return name


def left_out(teacher: PipelineTeacher) -> dict[str, nn.Module]:
    """The layers of the teacher that the student lacks, by name."""
    kept = {in_teacher(k) for k in student_of(teacher).state_dict()}
    parts = {k: m for k, m in teacher.net.named_modules() if re.search(r"\.\d+$", k)}
    return {k: m for k, m in parts.items() if m.state_dict() and not any(n.startswith(f"{k}.") for n in kept)}


def call(net: nn.Module, teacher: PipelineTeacher):
    noise = SeededNoise(2, 0).normal(teacher.shape)
    with torch.no_grad():
        return net(noise, torch.full((2,), 0.5, dtype=torch.float64), teacher.encode(["a red square", "rain"])).x0


# ---- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "count", "which"),
    [(1, 1, [0]), (1, 4, [0]), (2, 3, [0, 2]), (3, 4, [0, 1, 3]), (3, 5, [0, 2, 4]), (4, 10, [0, 3, 6, 9])],
)
def test_what_is_kept_is_evenly_spaced(kept, count, which):
    assert spaced(kept, count) == which


def test_of_any_stack_the_ends_are_kept_and_none_twice():
    for count in range(2, 60):
        for kept in range(2, count + 1):
            found = spaced(kept, count)
            assert (found[0], found[-1], len(set(found))) == (0, count - 1, kept)
            gaps = {found[i + 1] - found[i] for i in range(kept - 1)}
            assert max(gaps) - min(gaps) <= 1


def test_the_part_is_rounded_and_one_layer_stays():
    assert [kept_of(n, 0.5) for n in (0, 1, 2, 3, 4, 19, 38)] == [0, 1, 1, 2, 2, 10, 19]
    assert [kept_of(5, part) for part in (0.01, 0.3, 0.6, 0.9, 1.0)] == [1, 2, 3, 4, 5]


@every
def test_the_students_weights_are_the_teachers(name):
    teacher = deep(name)
    before = {k: v.clone() for k, v in teacher.net.state_dict().items()}
    net = student_of(teacher)
    mine = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) < sum(p.numel() for p in teacher.net.parameters())
    assert any(in_teacher(k) != k for k in mine)
    for key, value in mine.items():
        assert torch.equal(value, before[in_teacher(key)]), key
    assert all(p.requires_grad for p in net.parameters())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in teacher.net.parameters()}
    after = teacher.net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert getattr(teacher.net, teacher.part).config[next(iter(DEEP.get(name, {"num_layers": 5})))] in (3, 5)


@every
def test_without_what_does_nothing_the_student_is_the_teacher(name):
    """Layers that add nothing to what passes through them are left out: not one number changes by it."""
    teacher = deep(name)
    gone = left_out(teacher)
    assert gone
    for layer, module in gone.items():
        for p in module.parameters():
            p.data.zero_()
        if ".up_blocks." in layer and "resnets" in layer:  # it reads a skip beside, which it drops
            shortcut = module.conv_shortcut.weight
            shortcut.data[:, : len(shortcut), 0, 0] = torch.eye(len(shortcut))
    whole, small = call(teacher.net, teacher), call(student_of(teacher), teacher)
    assert whole.std() > 0.01
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5)


@every
def test_a_smaller_student_on_disk_is_a_plain_pipeline_that_draws_the_same(name, tmp_path):
    teacher = deep(name)
    few, net = FewStep(teacher.path, teacher.path.grid(1)), student_of(teacher)
    save_student(teacher, net, few, tmp_path, {"method": "none"})
    student, plain = load_student(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)
    network = getattr(plain, teacher.part)
    for key, value in getattr(net, teacher.part).state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    assert sum(p.numel() for p in network.parameters()) == student.card["weights"]["student"]
    assert student.card["weights"]["student"] < student.card["weights"]["teacher"]
    check_parity(student.model, student.model.net, few, plain, teacher.caller.seeded)
    assert call(teacher.net, teacher).sub(call(net, teacher)).abs().max() > 1e-3, "what is left out did nothing"


def test_the_whole_student_is_a_copy(teachers):
    """layers=1 is what a copy is, name by name; and of the other players nothing is ever left out."""
    for name in ("sd15", "sd3"):
        net = teachers[name].net
        for role in (
            make_role(net, "student", Settings()),
            make_role(net, "fake", Settings(layers=0.5)),
        ):
            want = copy.deepcopy(net).state_dict()
            assert list(role.state_dict()) == list(want)
            assert all(torch.equal(v, want[k]) for k, v in role.state_dict().items())


def test_the_small_net_of_exact_teachers():
    net = Net(VP(), "v", 2, 3, 1.0, width=8)
    small = net.fewer(0.67)
    mine, theirs = small.state_dict(), net.state_dict()
    assert len(small.body) == 2
    assert all(torch.equal(v, theirs[re.sub(r"^body\.1\.", "body.2.", k)]) for k, v in mine.items())
    with torch.no_grad():
        for p in net.body[1].parameters():
            p.zero_()
        nn.init.normal_(net.leave.weight)
        x, t, cond = (
            torch.randn(4, 2),
            torch.full((4,), 0.4, dtype=torch.float64),
            {"label": torch.tensor([-1, 0, 1, 2])},
        )
        assert torch.equal(net.fewer(0.67)(x, t, cond).x0, net(x, t, cond).x0)
        assert torch.equal(net.fewer(1.0)(x, t, cond).x0, net(x, t, cond).x0)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A tiny pipeline on disk whose UNet has two residual layers per block, of two widths."""
    pipeline = tiny_pipeline()
    network = type(pipeline.unet).from_config({**pipeline.unet.config, "layers_per_block": 2})
    pipeline.register_modules(unet=network)
    folder = tmp_path_factory.mktemp("deep") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(deep_folder, tmp_path_factory):
    """A teacher with a UNet and one with a transformer of three blocks, on disk."""
    transformer = tmp_path_factory.mktemp("deep") / "pixart"
    pipeline_of("pixart-sigma").save_pretrained(transformer)
    return {"unet": deep_folder, "transformer": transformer}


@pytest.fixture(scope="module")
def loaded(folders):
    return {part: PipelineTeacher.load(folder) for part, folder in folders.items()}


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_slimflow_trains_a_smaller_student(part, folders, loaded, tmp_path):
    """It is written, compared with plain diffusers (distill raises where they differ), resumed and gone on from."""
    teacher, out = folders[part], tmp_path / "run"
    run = {**SHORT, "prompts": PROMPTS, "layers": 0.5}
    student = onestroke.distill(str(teacher), out=out, **run)
    network = getattr(student.model.pipeline, part)
    config = json.loads((out / part / "config.json").read_text())
    assert config["layers_per_block" if part == "unet" else "num_layers"] == {"unet": 1, "transformer": 2}[part]
    whole = loaded[part]
    weights = {k: sum(p.numel() for p in n.parameters()) for k, n in (("student", network), ("teacher", whole.net))}
    assert student.card["weights"] == weights
    assert weights["student"] < weights["teacher"]
    assert student.card["layers"] == 0.5
    assert json.loads((out / "parity.json").read_text())["passed"]
    assert (
        f"{weights['student'] / 1e6:.4g} million; its teacher has {weights['teacher'] / 1e6:.4g} million"
        in (out / "README.md").read_text()
    )
    begun = student_of(whole, 0.5).state_dict()
    assert any(not torch.equal(v, begun[f"{part}.{k}"]) for k, v in network.state_dict().items()), "nothing was learned"

    more = onestroke.distill(str(teacher), out=out, **{**run, "steps": 3}, resume=True)
    assert more.card["rounds"] == 3
    on = onestroke.distill(str(teacher), out=tmp_path / "on", init=str(out), **{**run, "lr": 0.0, "ema": 0.0})
    assert all(torch.equal(v, more.model.net.state_dict()[k]) for k, v in on.model.net.state_dict().items())
    with pytest.raises(InputError, match=r"has layers=0\.5 of its teacher's; set that, not layers=1\.0"):
        onestroke.distill(str(teacher), out=tmp_path / "other", init=str(out), **{**run, "layers": 1.0})
    with pytest.raises(InputError, match=r"another run: its setting layers is 0\.5, not 0\.6"):
        onestroke.distill(str(teacher), out=out, **{**run, "layers": 0.6}, resume=True)

    with pytest.raises(InputError, match=r"a LoRA goes with all layers of its base, and this student has layers=0\.5"):
        onestroke.export(out, to="lora", out=tmp_path / "lora")
    with pytest.raises(InputError, match="a ControlNet goes with all layers"):
        student.with_controlnet("anything")
    assert onestroke.merge([out, tmp_path / "on"], out=tmp_path / "merged").card["layers"] == 0.5
    onestroke.export(out, to="diffusers", out=tmp_path / "half", dtype="float16")


def played(method: str, teacher: PipelineTeacher, layers: float) -> Trainer:
    """Four rounds with a smaller student, in which every phase begins; a loss that is not finite raises."""
    cls = get_method(method)
    given = {"layers": layers, "lora_rank": 0, "steps": 4, "batch_size": 2, "lr": 1e-3, "log_with": "none"}
    given |= {**at_once(method), **PHASES.get(method, {}), **({"branch": False} if "branch" in options(cls) else {})}
    _, run, chosen = plan_run("tiny", method, PROMPTS, given, NO_PICTURES)
    cond, x0 = teacher.conditions(PROMPTS), SeededNoise(len(PROMPTS), 1).normal(teacher.shape)
    playing = cls(parts_of(teacher, run, None, lambda x, cond: -x.flatten(1).square().mean(1), cond), **chosen)
    ways = x0[:, None] * torch.linspace(0.5, 1, run.solver_steps + 1).reshape(-1, 1, 1, 1)
    trainer = Trainer(playing, Data(teacher.shape, cond, x0, Pairs(x0.flip(0), x0), ways), run)
    for _ in range(4):
        trainer.one_round(0.0)
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_smaller_student(method, loaded):
    """It alone is small, and it moves; the other players are as large as the teacher."""
    teacher = loaded["unet"]
    trainer = played(method, teacher, 0.5)
    begun, net = student_of(teacher, 0.5), plain(trainer.finish())
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in begun.state_dict().items()}
    assert any(not torch.equal(v, begun.state_dict()[k]) for k, v in net.state_dict().items())
    if "fake" in trainer.method.players:
        names = {k.removeprefix("net.") for k in trainer.bare("fake").state_dict()}
        assert names >= set(teacher.net.state_dict())


@pytest.mark.parametrize("method", ["sida", "dmd2"])
def test_a_discriminator_reads_the_layers_of_the_whole_copy(method, loaded):
    """Of three blocks the second is the bottleneck, which a student of one block does not have."""
    teacher = loaded["transformer"]
    assert (teacher.net.bottleneck, student_of(teacher, 0.3).bottleneck) == (1, 0)
    played(method, teacher, 0.3)


def test_the_plan_of_a_smaller_student(folders, loaded):
    """Its role holds weights, two moments and a step number per tensor, and the average; the fake's is whole."""
    teacher = loaded["unet"]
    small = student_of(teacher, 0.5)
    found = plan(folders["unet"], "swiftbrush", layers=0.5, batch_size=1, steps=1, lora_rank={"*": 0})
    sizes = {
        k: (sum(p.numel() for p in n.parameters()), len(list(n.parameters())))
        for k, n in (("student", small), ("fake", teacher.net))
    }
    assert found.roles == {
        "student": 4 * 4 * sizes["student"][0] + 4 * sizes["student"][1],
        "fake": 4 * 3 * sizes["fake"][0] + 4 * sizes["fake"][1],
    }


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0.0, -0.5, 1.1, float("nan")])
def test_a_part_is_refused(layers):
    with pytest.raises(InputError, match=r"layers=.* must lie in \(0, 1\]"):
        Settings(layers=layers)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("slimflow", {"lora_rank": {"student": 4}}, r"with LoRA has all layers of its teacher; leave layers=0\.5 out"),
        ("lcm", {"lora_rank": 4}, r"or set lora_rank\.student=0"),
        ("speedupnet", {"lora_rank": 0}, r"leave layers=0\.5 out, or set branch=false"),
        ("kd", {"layers": "half"}, "layers='half' must be of type float"),
    ],
)
def test_what_does_not_go_with_fewer_layers(method, settings, said):
    with pytest.raises(InputError, match=said):
        plan_run("tiny", method, PROMPTS, {"layers": 0.5, **settings}, NO_PICTURES)


def test_a_network_without_layers_to_leave_out_is_refused(pipeline_folder, tmp_path, monkeypatch):
    """One per block; before anything is loaded, and by `plan` too."""
    said = "a UNet2DConditionModel with layers_per_block=1, transformer_layers_per_block=1 has no layer to leave out"
    monkeypatch.setattr(PipelineTeacher, "load", None)
    with pytest.raises(InputError, match=said):
        onestroke.distill(str(pipeline_folder), method="slimflow", prompts=PROMPTS, out=tmp_path / "run", layers=0.5)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=said):
        plan(pipeline_folder, "slimflow", layers=0.5)


def test_a_network_that_diffusers_builds_otherwise_is_refused():
    """The last block of an SD3 writes no text: the first cannot stand alone in its place."""
    teacher = deep("sd3")
    with pytest.raises(InputError, match=r"SD3Transformer2DModel with num_layers=1.* keep more than layers=0\.2"):
        student_of(teacher, 0.2)


def test_an_exact_teacher_has_no_layers():
    with pytest.raises(InputError, match=r"a GaussianMixture has no layers to leave out; leave layers=0\.5 out"):
        make_role(GaussianMixture(VP(), [[0.0]], 1.0), "student", Settings(layers=0.5))


def test_parts_say_the_bottleneck_of_the_teacher():
    """Its copies are judged there, whatever the student has."""
    teacher, student = Net(VP(), "v", 2, 3, 1.0, width=8), Net(VP(), "v", 2, 3, 1.0, width=8)
    teacher.bottleneck, student.bottleneck = 1, 0
    parts = Parts(teacher, student, lambda role: copy.deepcopy(teacher), FewStep(VP()), {})
    assert parts.bottleneck == 1

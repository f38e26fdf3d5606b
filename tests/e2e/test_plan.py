"""The planned memory is that of the run: the same rounds on real tensors hold the same bytes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import UNet2DConditionModel

from conftest import tiny_pipeline
from onestroke.denoiser import fused_attention
from onestroke.errors import InputError
from onestroke.methods import get_method
from onestroke.plan import (
    NO_PICTURES,
    HollowTrainer,
    Plan,
    hollow_teacher,
    parse_bytes,
    plan,
    played,
    switches,
    watched,
)
from onestroke.rewards import KEY, load_reward
from onestroke.run import parts_of, plan_run
from onestroke.teachers import load_teacher
from onestroke.training.train import Data, Trainer

TWO = {"steps": 2}  # their rounds are alike: the last need not be played too
SETTINGS = [
    {**TWO, "batch_size": 8},
    {**TWO, "batch_size": 4, "accumulate": 2, "lora_rank": {"*": 4}, "ema": 0.0},
    {**TWO, "batch_size": 8, "precision": "bf16", "gradient_checkpointing": True},
    {**TWO, "batch_size": 8, "offload": True},
]
LATE = {"batch_size": 8, "score_weight": 1.0, "steps": 4}  # scores in the last round
JUDGED = [
    (True, {**TWO, "batch_size": 8}),
    (True, {**TWO, "batch_size": 8, "offload": True}),
    (False, {**TWO, "batch_size": 4, "accumulate": 2, "lora_rank": {"*": 4}}),
]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """The tiny pipeline with one level of its network, since every operation on a hollow tensor takes long."""
    pipeline = tiny_pipeline()
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    one = {**pipeline.unet.config, **blocks, "block_out_channels": [16], "mid_block_type": None}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(one))
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def lived(folder, method: str, **settings):
    """The plan's figures of the same rounds on real tensors."""
    _, run, chosen = plan_run(str(folder), method, ["prompt"], {**settings, "log_with": "none"}, NO_PICTURES)
    with watched() as memory:
        teacher, judge = load_teacher(folder), None
        null = teacher.null
        if "reward" in get_method(method).needs:
            judge = load_reward(run.reward, teacher)
            null = {**null, KEY: judge.encode([""])}
        teacher.pipeline.register_modules(**dict.fromkeys(teacher.encoders))
        playing = get_method(method)(parts_of(teacher, run, null, judge), **chosen)
        rows = run.batch_size * run.accumulate
        cond = {k: v.expand(rows, *v.shape[1:]).clone() for k, v in null.items()}
        main = (HollowTrainer, memory) if run.offload else (Trainer,)  # here a copy stands for main memory
        trainer = main[0](*main[1:], playing, Data(teacher.shape, cond), run)
        x0 = torch.zeros(run.batch_size, *teacher.shape)
        trainer.data = Data(teacher.shape, {k: v[: run.batch_size] for k, v in cond.items()}, x0)
        return played(trainer, run.accumulate, run.batch_size, memory)


def assert_lived(folder, method: str, settings) -> None:
    """Within 10 %: kernels of real tensors may keep values beside those that shapes tell of."""
    device = "cuda" if settings.get("offload") else "cpu"
    planned = plan(folder, method, device=device, **settings)
    with fused_attention() if device == "cuda" else nullcontext():
        real = lived(folder, method, **settings)
    assert planned.peak == pytest.approx(real.peak, rel=0.1)
    assert planned.roles == real.roles
    assert planned.working == pytest.approx(real.working, rel=0.15)


@pytest.mark.parametrize(
    ("method", "settings"),
    [*(("swiftbrush", s) for s in SETTINGS), ("sid", SETTINGS[0]), ("hyper-sd", LATE)],
)
def test_the_plan_is_what_the_run_holds(pipeline_folder, method, settings):
    assert_lived(pipeline_folder, method, settings)


@pytest.mark.parametrize(("own", "settings"), JUDGED, ids=["own", "offload", "clip"])
def test_the_plan_of_a_reward_is_what_the_run_holds(own, settings, towered_folder, pipeline_folder, clip_folder):
    """Its towers and the decoder, with gradient: of the teacher, or of a CLIP model."""
    folder, reward = (towered_folder, "") if own else (pipeline_folder, f"clip:{clip_folder}")
    assert_lived(folder, "diff-instruct-pp", {**settings, "reward": reward})


def test_a_phase_that_comes_late_is_planned(pipeline_folder):
    """Scores in the last stage of hyper-sd: of a run that does not come to it the fake alone is held."""
    late, early, plain = (
        plan(pipeline_folder, "hyper-sd", **{**LATE, **more})
        for more in ({}, {"stage_steps": 4}, {"score_weight": 0.0})
    )
    assert late.roles == early.roles
    assert late.working > 1.2 * early.working
    assert early.working == pytest.approx(plain.working, rel=0.05)
    assert late.peak > plain.peak + late.roles["fake"]


def test_an_optional_reward_is_planned(towered_folder, clip_folder, monkeypatch):
    """Its tower, and what its gradient holds; a CLIP model has a text tower besides. No weights are read for it."""
    image_tower = load_teacher(towered_folder).pipeline.image_encoder
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", None)
    monkeypatch.setattr("transformers.CLIPVisionModelWithProjection.from_pretrained", None)
    asked = {**TWO, "batch_size": 8, "reward_weight": 1.0}
    none, own, clip = (
        plan(towered_folder, "hyper-sd", **more)
        for more in ({**TWO, "batch_size": 8}, asked, {**asked, "reward": f"clip:{clip_folder}"})
    )
    tower = sum(4 * p.numel() for p in image_tower.parameters())
    assert own.frozen - none.frozen == pytest.approx(tower, rel=0.1)
    assert clip.frozen > own.frozen
    assert min(own.working, clip.working) > none.working


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (len, "a reward that is a function cannot be planned; give reward=clip:<folder>"),
        ("", "has no image tower that pairs with its text encoder"),
        ("clip:nowhere", "no such CLIP folder or hub id"),
    ],
)
def test_a_reward_that_is_refused(pipeline_folder, reward, says):
    with pytest.raises(InputError, match=says):
        plan(pipeline_folder, "diff-instruct-pp", reward=reward)


def test_what_each_role_holds(pipeline_folder):
    """Weights, two moments and a step number per tensor; the student's average beside. LoRA holds adapters alone."""
    net = load_teacher(pipeline_folder).net
    weights, count = sum(4 * p.numel() for p in net.parameters()), len(list(net.parameters()))
    found = plan(pipeline_folder, "swiftbrush", **TWO, lora_rank={"*": 0})
    assert found.roles == {"student": 4 * weights + 4 * count, "fake": 3 * weights + 4 * count}
    small = plan(pipeline_folder, "swiftbrush", **TWO, lora_rank={"*": 4})
    assert small.roles["student"] < 0.5 * found.roles["student"]
    assert small.frozen == pytest.approx(found.frozen, rel=0.02)
    assert found.peak == found.frozen + sum(found.roles.values()) + found.working


def test_the_optimiser_in_8_bits_holds_a_quarter(pipeline_folder):
    """Of the numbers in large tensors; this tiny network has few."""
    params = list(load_teacher(pipeline_folder).net.parameters())
    large = [p.numel() for p in params if p.numel() >= 4096]
    scales = sum(2 * 4 * -(-n // 256) for n in large)
    settings = {**TWO, "batch_size": 1, "ema": 0.0, "lora_rank": {"*": 0}}
    small = plan(pipeline_folder, "swiftbrush", optimizer="adamw8bit", **settings)
    counts = sum(12 * n + 4 for p in params if (n := p.numel()))
    assert large
    assert counts - small.roles["fake"] == 6 * sum(large) - scales
    pytest.importorskip("bitsandbytes")
    assert lived(pipeline_folder, "swiftbrush", optimizer="adamw8bit", **settings).roles == small.roles


def test_offload_leaves_one_role_at_a_time(pipeline_folder):
    """Nothing lies on the device all the time; at the peak it holds the student with its gradient and optimiser."""
    weights = sum(4 * p.numel() for p in load_teacher(pipeline_folder).net.parameters())
    settings = {**TWO, "batch_size": 1, "lora_rank": {"*": 0}, "offload": True}
    small = plan(pipeline_folder, "swiftbrush", device="cuda", **settings)
    assert max(small.roles.values()) < 0.01 * weights, "more than the counts of steps"
    assert 5 * weights < small.working < 6.5 * weights


def test_nothing_is_loaded(pipeline_folder):
    net = hollow_teacher(pipeline_folder).net
    assert {type(p).__name__ for p in net.parameters()} <= {"FakeTensor", "Parameter"}
    with pytest.raises(RuntimeError):
        next(net.parameters()).numpy()


def test_the_cheapest_switches_that_fit(pipeline_folder, monkeypatch):
    """By a stand-in for the plan: the largest saving comes last, and what is not needed is left out."""
    saving = {"precision": 1, "gradient_checkpointing": 2, "batch_size": 4, "optimizer": 8, "offload": 16}

    def stand_in(teacher, method, device=None, **given):
        size = 100 - sum(v for k, v in saving.items() if k in given) - 32 * ("lora_rank" in given)
        return Plan(size, 0, {})

    monkeypatch.setattr("onestroke.plan.plan", stand_in)

    def cheapest(memory: int) -> list[str]:
        return switches(pipeline_folder, "swiftbrush", memory)[0]

    assert cheapest(99) == ["precision=bf16"]
    assert cheapest(97) == ["precision=bf16", "gradient_checkpointing=true"]
    assert cheapest(92) == ["optimizer=adamw8bit"]
    assert cheapest(90) == ["gradient_checkpointing=true", "optimizer=adamw8bit"]
    assert cheapest(68) == ["lora_rank=64"]
    assert len(cheapest(37)) == 6
    assert switches(pipeline_folder, "swiftbrush", 36) is None


def test_on_the_command_line(onestroke, pipeline_folder):
    words = ("plan", pipeline_folder, "--method", "swiftbrush", "--batch-size", 2)
    said = onestroke(*words, "--memory", "24GiB")
    assert said.code == 0, said
    assert "fits into 24GiB" in said.out
    small = onestroke(*words, "--memory", "1kB")
    assert "no set of switches" in small.out
    assert small.code == 1
    assert onestroke(*words, "--memory", "much").code == 2
    wrong = onestroke(*words, "--resolution", 17)
    assert wrong.code == 2
    assert wrong.err.count("\n") == 1


def test_a_method_that_encodes_prompts_of_its_own(pipeline_folder):
    """As many as it is given; nothing is read for them."""
    assert plan(pipeline_folder, "pg-sb", **TWO, batch_size=1, negatives="blurry; ugly").peak > 0


def test_no_matrix_of_attention_is_kept(teachers):
    """The weights of every pair of tokens are neither in the memory of a GPU nor in that of a CPU."""
    teacher, folder = teachers["sd15"], teachers.root / "sd15"
    cpu, cuda = (
        plan(folder, "swiftbrush", device=name, **TWO, batch_size=8, height=64, width=64) for name in ("cpu", "cuda")
    )
    assert teacher.part == "unet"
    tokens, heads = (64 // 2) ** 2, 2
    assert cpu.peak - cuda.peak < 8 * heads * tokens**2 * 4
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        plan(folder, "swiftbrush", device="tpu")


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5 GB", 1_500_000_000), ("800mib", 800 * 2**20)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 apples", "1TiBx"])
def test_sizes_refused(text):
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes(text)


def test_the_default_device_is_left_alone():
    with watched() as memory:
        torch.zeros(1000)
        kept = torch.zeros(500)
    assert (memory.now, memory.peak) == (2000, 4000)
    del kept


def test_the_ways_of_a_batch_are_planned(pipeline_folder):
    """Float32 states of four by four by four numbers."""
    few, many = (plan(pipeline_folder, "boss", **TWO, knots="grid", batch_size=8, solver_steps=k) for k in (8, 200))
    assert many.peak - few.peak == pytest.approx(8 * (200 - 8) * 64 * 4, rel=0.02)

"""NASA: attention steered away from a second text, by its closed form, in every family, and on a plain pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn

from families import FAMILIES
from onestroke import negative_prompt
from onestroke.denoiser import PREFIX, SCALE, negated
from onestroke.errors import InputError
from onestroke.plan import goes
from onestroke.sampling import FewStep
from onestroke.students.student import SeededNoise, load_student, save_student
from onestroke.teachers.calls import Call
from onestroke.teachers.nasa import steered
from onestroke.teachers.pipeline import PipelineTeacher

STREAMS = ("lumina2", "z-image")  # text and picture in one
STEERED = [name for name in FAMILIES if name not in STREAMS]
PROMPTS, AWAY = ["a red square", "rain"], "blue sky"


# ---- the closed form -------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A network of one attention, called as pipelines call theirs."""

    def __init__(self, attn: Attention):
        super().__init__()
        self.attn = attn

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask=None):
        out = self.attn(sample, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        return (out,)


class Block(OneLayer):
    def forward(self, hidden_states, encoder_hidden_states):
        return self.attn(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)


class OneBlock(nn.Module):
    def __init__(self, attn: Attention):
        super().__init__()
        self.block = Block(attn)

    def forward(self, sample, timestep, encoder_hidden_states):
        return (self.block(hidden_states=sample, encoder_hidden_states=encoder_hidden_states)[0],)


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def weights(q, k, mask=None):
    scores = heads(q) @ heads(k).transpose(-1, -2) / heads(q).shape[-1] ** 0.5
    return (scores if mask is None else scores + mask).softmax(-1)


def joined(z):
    return z.transpose(1, 2).flatten(2)


def told(text, away, scale):
    return {SCALE: torch.tensor([float(scale)] * len(text)), PREFIX + "text": away}


def call(net, picture, text, cond, **more):
    with steered(net, Call(), cond), torch.no_grad():
        return net(picture, torch.zeros(2), encoder_hidden_states=text, **more)[0]


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("length", [5, 2])
def test_cross_attention(scale, length):
    torch.manual_seed(0)
    attn = Attention(query_dim=6, cross_attention_dim=3, heads=2, dim_head=4, residual_connection=True, bias=True)
    picture, text, away = torch.randn(2, 7, 6), torch.randn(2, 5, 3), torch.randn(2, length, 3)
    found = call(OneLayer(attn), picture, text, told(text, away, scale))
    with torch.no_grad():
        plus, minus = (joined(weights(attn.to_q(picture), attn.to_k(y)) @ heads(attn.to_v(y))) for y in (text, away))
        want = attn.to_out[0](plus - scale * minus) + picture
        same = call(OneLayer(attn), picture, text, told(text, text, scale))
        assert torch.allclose(same, attn.to_out[0]((1 - scale) * plus) + picture, atol=1e-5)
    assert torch.allclose(found, want, atol=1e-5)


def test_the_second_text_has_a_mask_of_its_own():
    torch.manual_seed(0)
    attn, rows = Attention(query_dim=6, cross_attention_dim=3, heads=2, dim_head=4), {"encoder_hidden_states": "text"}
    picture, text, away = torch.randn(2, 7, 6), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    how = Call(rows={**rows, "encoder_attention_mask": "mask"})
    cond = {**told(text, away, 0.5), PREFIX + "mask": torch.tensor([[1, 1, 0, 0, 0]]).expand(2, -1)}

    class Masked(OneLayer):
        def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask):
            bias = ((1 - encoder_attention_mask.float()) * -10000)[:, None]
            return super().forward(sample, timestep, encoder_hidden_states, bias)

    with steered(net := Masked(attn), how, cond), torch.no_grad():
        found = net(picture, torch.zeros(2), text, torch.ones(2, 5))[0]
    short = call(OneLayer(attn), picture, text, told(text, away[:, :2], 0.5))
    assert torch.allclose(found, short, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_joint_attention(scale):
    """The picture's queries attend to picture and text at once; of the second text its part alone is subtracted."""
    torch.manual_seed(0)
    attn = Attention(
        query_dim=8,
        added_kv_proj_dim=8,
        heads=2,
        dim_head=4,
        out_dim=8,
        context_pre_only=False,
        bias=True,
        processor=JointAttnProcessor2_0(),
    )
    picture, text, away = torch.randn(2, 7, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = call(OneBlock(attn), picture, text, told(text, away, scale))

    def parts(y):
        w = weights(attn.to_q(picture), torch.cat([attn.to_k(picture), attn.add_k_proj(y)], 1))
        return joined(w[..., :7] @ heads(attn.to_v(picture))), joined(w[..., 7:] @ heads(attn.add_v_proj(y)))

    with torch.no_grad():
        (own, plus), (_, minus) = parts(text), parts(away)
        assert torch.allclose(found, attn.to_out[0](own + plus - scale * minus), atol=1e-5)
        same = call(OneBlock(attn), picture, text, told(text, text, scale))
        assert torch.allclose(same, attn.to_out[0](own + (1 - scale) * plus), atol=1e-5)


# ---- every family ----------------------------------------------------------------------------------------------------


def drawn(teacher, cond):
    noise, t = SeededNoise(2, 0).normal(teacher.shape), torch.full((2,), 0.7, dtype=torch.float64)
    with torch.no_grad():
        return teacher.net(noise, t, cond)


@pytest.mark.parametrize("name", STEERED)
def test_a_scale_of_zero_is_the_identity(name, teachers):
    """To the bit where it is given as a number; the mechanism itself to rounding. Features are those of the picture."""
    teacher = teachers[name]
    cond, away = teacher.encode(PROMPTS), teacher.encode([AWAY])
    before, params = drawn(teacher, cond), sum(p.numel() for p in teacher.net.parameters())
    assert torch.equal(drawn(teacher, negated(cond, away, 0.0)).x0, before.x0)
    still = drawn(teacher, {**negated(cond, away, 0.5), SCALE: torch.zeros(2)})
    steeredly = drawn(teacher, negated(cond, away, 0.5))
    assert torch.allclose(still.x0, before.x0, atol=1e-5)
    assert (steeredly.x0 - before.x0).abs().max() > 1e-4
    assert [f.shape for f in steeredly.features] == [f.shape for f in before.features]
    assert torch.equal(drawn(teacher, cond).x0, before.x0), "something was left behind"
    assert sum(p.numel() for p in teacher.net.parameters()) == params


@pytest.mark.parametrize("name", ["pixart-alpha", "sana", "qwen-image", "flux-guided"])
def test_rows_and_padding_do_not_matter(name, teachers):
    """A row is steered by its own text, however long the others are."""
    teacher = teachers[name]
    cond = teacher.encode(PROMPTS)
    both = teacher.encode([AWAY, "a very long prompt of many words"])
    rows = drawn(teacher, negated(cond, both, 0.5)).x0
    for i in range(2):
        one = drawn(teacher, negated(cond, teacher.encode([[AWAY, "a very long prompt of many words"][i]]), 0.5)).x0
        assert torch.allclose(rows[i], one[i], atol=1e-5)


@pytest.mark.parametrize("name", STREAMS)
def test_one_stream_cannot_be_steered(name, teachers):
    teacher = teachers[name]
    cond = teacher.encode(PROMPTS)
    with pytest.raises(InputError, match="keeps text and picture in one stream"):
        drawn(teacher, negated(cond, cond, 0.5))


def test_gradients_reach_both_texts(teachers):
    for name in ("sd15", "sd3"):
        teacher = teachers[name]
        cond, away = teacher.encode(PROMPTS), dict(teacher.encode([AWAY]))
        away["text"] = away["text"].clone().requires_grad_()
        noise, t = SeededNoise(2, 0).normal(teacher.shape), torch.full((2,), 0.7, dtype=torch.float64)
        teacher.net(noise, t, negated(cond, away, 0.5)).x0.square().mean().backward()
        assert away["text"].grad.abs().max() > 0


# ---- students and pipelines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEERED)
def test_a_plain_pipeline_is_steered_the_same(name, teachers, tmp_path):
    teacher = teachers[name]
    few = FewStep(teacher.path, teacher.path.grid(1))
    save_student(teacher, teacher.net, few, tmp_path / "student", {"method": "none"})
    student = load_student(tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    ours = student(PROMPTS, 5, negative_prompt=AWAY, nasa_scale=0.7)
    plain = student(PROMPTS, 5)
    assert student(PROMPTS, 5, negative_prompt=AWAY, nasa_scale=0.0)[0].tobytes() == plain[0].tobytes()

    def theirs():
        generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
        return pipeline(list(PROMPTS), generator=generators, **student.card["call"]).images

    def gap(one, other):
        pairs = zip(one, other, strict=True)
        return max(abs(a - b) for x, y in pairs for a, b in zip(x.tobytes(), y.tobytes(), strict=True))

    with negative_prompt(pipeline, AWAY, 0.7, size=student.model.size):
        assert gap(theirs(), ours) <= 1
    assert gap(theirs(), plain) <= 1
    assert gap(ours, plain) >= 1


def test_on_the_command_line(onestroke, pipeline_folder, teachers, tmp_path):
    teacher = teachers["sd15"]
    save_student(teacher, teacher.net, FewStep(teacher.path, teacher.path.grid(1)), tmp_path / "student", {})
    words = ("sample", tmp_path / "student", "rain", "--negative", "a cat")
    plain = onestroke(*words[:3], "--out", tmp_path / "plain.png")
    said = onestroke(*words, "--nasa-scale", 0.7, "--out", tmp_path / "steered.png")
    assert (plain.code, said.code) == (0, 0), said
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "steered.png").read_bytes()
    onestroke(*words, "--nasa-scale", 0, "--out", tmp_path / "zero.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "zero.png").read_bytes()
    said = onestroke("sample", pipeline_folder, "rain", "--negative", "a cat", "--out", tmp_path / "none.png")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "--negative goes with a student" in said.err


def test_training_with_negative_prompts(onestroke, pipeline_folder, prompt_file, tmp_path):
    words = ("distill", pipeline_folder, "--method", "pg-sb", "--prompts", prompt_file, "--out", tmp_path / "run")
    how = ("--steps", 2, "--batch-size", 2, "--set", "negatives=blurry; ugly", "--set", "log_with=none")
    assert onestroke(*words, *how).code == 0


def test_what_cannot_be_trained_with_them(onestroke, teachers, pipeline_folder, prompt_file, tmp_path, monkeypatch):
    """Refused before anything is loaded, and never proposed."""
    streams = teachers["lumina2"].source
    monkeypatch.setattr(PipelineTeacher, "load", lambda *args, **more: pytest.fail("the teacher was loaded"))
    named = "negatives=blurry"
    checkpointed = ("--set", "gradient_checkpointing=true")
    for folder, more, says in (
        (pipeline_folder, checkpointed, "without gradient_checkpointing"),
        (streams, (), "text and picture in one stream"),
    ):
        words = ("distill", folder, "--method", "pg-sb", "--prompts", prompt_file, "--out", tmp_path / "other")
        said = onestroke(*words, "--set", named, *more)
        assert (said.code, said.err.count("\n")) == (2, 1), said
        assert says in said.err
        assert not (tmp_path / "other").exists()
    said = onestroke("plan", pipeline_folder, "--method", "pg-sb", "--set", named, *checkpointed)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert not goes(pipeline_folder, "pg-sb", {"negatives": "blurry", "gradient_checkpointing": True})
    for kept in ({"negatives": " ; ", "gradient_checkpointing": True}, {"negatives": "blurry"}):
        assert goes(pipeline_folder, "pg-sb", kept)

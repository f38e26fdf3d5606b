"""The model card of a student, README.md in the hub's format, from the records beside it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onestroke.errors import InputError, read_json
from onestroke.methods import get_method, options
from onestroke.settings import Settings
from onestroke.students.guidance import GUIDANCE
from onestroke.teachers import locate
from onestroke.teachers.branch import BRANCH

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
USE = {
    "diffusers": """import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{here}"{absent})
noise = torch.Generator().manual_seed(0)
pipeline("{prompt}", {call}, generator=noise).images[0]
""",
    "once": """from onestroke import load_student

load_student("{here}")("{prompt}", seed=0)[0]
""",
    "lora": """from diffusers import DiffusionPipeline, {scheduler}

pipeline = DiffusionPipeline.from_pretrained("{teacher}")
pipeline.load_lora_weights("{here}", weight_name="pytorch_lora_weights.safetensors")
pipeline.scheduler = {scheduler}.from_pretrained("{here}", subfolder="scheduler")
pipeline("{prompt}", {call}).images[0]
""",
    "onnx": """from onestroke.students.exports import OnnxStudent

student = OnnxStudent("{here}")
student(["{prompt}"], seed=0)[0]
""",
    "onnx without text": """from onestroke import load_student
from onestroke.students.exports import OnnxStudent
from onestroke.students.student import SeededNoise, to_pil

student, cond = OnnxStudent("{here}"), load_student("path/to/student").model.encode(["{prompt}"])
to_pil(student.decode(student.latents(cond, SeededNoise(1, 0))))[0]
""",
}
ONNX_NOTE = """
Without onestroke: `denoiser.onnx` maps `x`, `t` and the conditions to `x0`, `decoder.onnx` maps `x0` to images in
[0, 1], and `text_encoder.onnx`, where there is one, token ids to the condition `text`. `onestroke.json` lists
`(t, a, b)` of every call under `onnx.steps`: its input is `x = a * x0 + b * eps`, that of the first `onnx.start` times
noise. `eps` is new noise, or where `onnx.renoise` is `implied` the `(x - a * x0) / b` of the call before. Where
`onnx.alone` is true, a call draws one row, whose `text` has no padding.
"""
BRANCH_NOTE = """
This draws the teacher without guidance: the student's own part is its negative-prompt branch, `{branch}`, which reads
what not to draw. Through onestroke, and on this pipeline or a fine-tune of the teacher:

```python
from onestroke import load_student, negative_prompt

load_student("{here}")("a prompt", negative_prompt="blurry")
with negative_prompt(pipeline, "blurry", branch="{here}/{branch}"):
    pipeline("a prompt", {call}).images[0]
```
"""

GUIDANCE_NOTE = """
The pipeline draws as under a guidance_scale of {scale:g}, the run's. What the student has learned of others, from
{low:g} to {high:g}, is in `{guidance}`, which onestroke reads:

```python
from onestroke import load_student

load_student("{here}")("a prompt", guidance_scale={high:g})
```
"""
ONCE_NOTE = """
This student was trained to run its encoder once, on the noise, and its decoder for all steps. Diffusers opens this
folder, but its pipeline runs the encoder in every step: it draws other pictures, which nothing was trained for.
"""


def licence_of(source: str | Path) -> dict[str, str]:
    """What a teacher says of its licence: {"license": the hub's tag, "words": ...}; empty when it says nothing.

    Of a folder from its onestroke.json and the front matter of its README.md; of a hub id from its README.md.
    """
    try:
        folder = locate(source)
    except InputError:  # a pipeline that was built by hand
        return {}
    found = {}
    if isinstance(folder, Path):
        about = read_json(folder / "onestroke.json") if (folder / "onestroke.json").is_file() else {}
        found = {"words": str(about["licence"])} if about.get("licence") else {}
        page = folder / "README.md"
        text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    else:
        try:
            from huggingface_hub import hf_hub_download

            text = Path(hf_hub_download(folder, "README.md")).read_text(encoding="utf-8", errors="replace")
        except Exception:  # no net, no card, no access: a licence that cannot be read is said to be unknown
            text = ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    for key in ("license", "license_name", "license_link"):
        if head and (line := re.search(rf"^{key}:\s*(\S.*)$", head[1], re.MULTILINE)):
            found[key] = line[1].strip().strip("\"'")
    return found


def front_matter(card: dict[str, Any], kind: str) -> str:
    """The YAML head. A base model is named where it is one of the hub's."""
    licence, teacher = card.get("teacher_licence", {}), str(card.get("teacher", ""))
    head: dict[str, Any] = {
        "library_name": {"onnx": "onnx"}.get(kind, "diffusers"),
        "pipeline_tag": "text-to-image",
        "license": licence.get("license", "unknown"),
        **{k: licence[k] for k in ("license_name", "license_link") if k in licence},
        "tags": ["onestroke", "distillation", "few-step", str(card.get("method", "")), *([kind] * (kind == "lora"))],
    }
    if HUB_ID.fullmatch(teacher) and not Path(teacher).exists():
        head |= {"base_model": teacher, "base_model_relation": "adapter" if kind == "lora" else "finetune"}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items()) + "---\n"


def name_of(source: str) -> str:
    """A teacher as a reader elsewhere can use it: a name or a hub id as it is, of a folder its last part."""
    return Path(source).name if Path(source).is_dir() or source.startswith(("/", ".", "~")) else source


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def settings_of(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that are not the trainer's defaults, and the method's options."""
    usual = json.loads(json.dumps(asdict(Settings())))
    run = {k: v for k, v in recipe.get("settings", {}).items() if v != usual.get(k) or k in ("steps", "batch_size")}
    return [(f"`{k}`", f"`{json.dumps(v)}`") for k, v in {**run, **recipe.get("options", {})}.items()]


def figures_of(report: dict[str, Any]) -> str:
    """The rows of a report that measure a sampler, as a table."""
    rows = {k: v for k, v in report.items() if isinstance(v, dict) and "kid" in v}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    body = [(k, *(f"{row[n]:.4g}" if n in row else "" for n in names)) for k, row in rows.items()]
    return table(("", *names), body) if rows else ""


def data_use(method: str, recipe: dict[str, Any]) -> str:
    """What the student learned from, by the needs of its method with these options."""
    try:
        cls = get_method(method)
        needs = cls.needs_of({**options(cls), **recipe.get("options", {})}) - {"prompts"}
    except InputError:
        return "unknown"
    count = f"{recipe['prompts']} prompts" if "prompts" in recipe else "prompts"
    said = {
        "x0": "real images, whose captions are the prompts",
        "pairs": "pairs of noise and the teacher's own pictures",
        "ways": "the teacher's own ways from noise to picture",
        "reward": "a reward of the student's pictures",
    }
    return ", ".join([count, *(said[need] for need in sorted(needs & said.keys()))]) + "; no real images" * (
        "x0" not in needs
    )


def paper_of(method: str) -> str:
    try:
        return get_method(method).paper
    except InputError:
        return "unknown"


def text_of(folder: Path) -> str:
    """The card's text. `folder` holds onestroke.json, and recipe.json, parity.json and report.json where there are."""
    card, recipe, parity, report = (
        read_json(folder / f"{name}.json") if (folder / f"{name}.json").is_file() else {}
        for name in ("onestroke", "recipe", "parity", "report")
    )
    kind, method, teacher = card.get("format", "diffusers"), str(card.get("method")), str(card.get("teacher"))
    steps, licence = card["student_steps"], card.get("teacher_licence", {})
    once = card.get("encoder") == "once"
    about = {
        "Method": f"{method} ({paper_of(method)})",
        "Teacher": name_of(teacher),
        **weights_words(card),
        "Network calls per picture": f"1 of the encoder, {steps} of the decoder" if once else steps,
        "Learned from": data_use(method, recipe),
        "Rounds": card.get("rounds", "unknown"),
        "Licence of the teacher": licence.get("words") or licence.get("license") or "unknown: ask its authors",
    }
    call = {**card.get("call", {"guidance_scale": 1.0}), "num_inference_steps": steps}
    here, words = f"path/to/{folder.name}", ", ".join(f"{key}={value!r}" for key, value in call.items())
    way = kind
    if once and kind == "diffusers":
        way = "once"
    elif kind == "sprint":
        way = "diffusers"
    elif kind == "onnx" and "tokens" not in card["onnx"]:
        way = "onnx without text"
    use = USE[way].format(
        here=here,
        absent=absent_words(folder),
        prompt="a prompt",
        call=words,
        teacher=name_of(teacher),
        scheduler=scheduler_of(folder),
    )
    what = {
        "diffusers": "diffusers pipeline",
        "lora": "LoRA adapter of its teacher",
        "onnx": "set of ONNX graphs",
        "sprint": "SanaSprintPipeline of diffusers",
    }[kind]
    calls = "one call of its network" if steps == 1 else f"{steps} calls of its network"
    if once:
        calls = f"one run of its network's encoder and {steps} of the decoder, in parallel"
    parts = [
        front_matter(card, kind),
        f"# {folder.name}\n\nA student of {name_of(teacher)} that draws in {calls}, distilled by"
        f" {method} with onestroke. This folder is a {what}.\n\n",
        table(("", ""), list(about.items())),
        "\nA student inherits the licence of its teacher; the attributions of the teacher's own card hold here too.\n",
        f"\n## Use\n\n```python\n{use}```\n",
        ONCE_NOTE if once else "",
        ONNX_NOTE if kind == "onnx" else "",
        BRANCH_NOTE.format(branch=BRANCH, here=here, call=words) if (folder / BRANCH).is_file() else "",
        guidance_words(card["guidance"], here) if (folder / GUIDANCE).is_file() else "",
        "\n## Settings\n\n" + table(("setting", "value"), settings_of(recipe)) if recipe else "",
        "\n## Measured\n\n" + figures_of(report) if report and figures_of(report) else "",
        "\n## Parity\n\n" + parity_words(parity) if parity else "",
    ]
    return "".join(parts)


def guidance_words(told: dict[str, float], here: str) -> str:
    """How a student that was told its guidance is drawn with under another."""
    low, high = told["scale"] - told["reach"], told["scale"] + told["reach"]
    return GUIDANCE_NOTE.format(scale=told["scale"], low=low, high=high, guidance=GUIDANCE, here=here)


def weights_words(card: dict[str, Any]) -> dict[str, str]:
    """How many weights the student's network has, and its teacher's where that is another number."""
    if "weights" not in card:
        return {}
    student, teacher = (f"{card['weights'][who] / 1e6:.4g} million" for who in ("student", "teacher"))
    return {"Weights": student + f"; its teacher has {teacher}" * (student != teacher)}


def scheduler_of(folder: Path) -> str:
    """The class of the scheduler in a folder, where there is one."""
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file)["_class_name"] if file.is_file() else ""


def absent_words(folder: Path) -> str:
    """What plain `from_pretrained` must be told beside the folder's name."""
    from onestroke.teachers.pipeline import absent

    file = folder / "model_index.json"
    return "".join(f", {part}=None" for part in absent(read_json(file))) if file.is_file() else ""


def parity_words(parity: dict[str, Any]) -> str:
    """What parity.json says, in two sentences."""
    found, steps = parity["max_abs_difference"], "1 step" if parity["steps"] == 1 else f"{parity['steps']} steps"
    words = (
        f"Drawn with this folder ({parity['dtype']}, {steps}) and with the sampler of training from the same noise,"
        + " by onestroke, as diffusers runs the encoder in every step," * (parity.get("sampler") == "onestroke")
        + f" latents differ by at most {found['latents']:.2g} of their peak and pictures by {found['images']:.2g} of"
        f" [0, 1]; {parity['tolerance']:g} is allowed.\n"
    )
    if lost := parity.get("lost_by_rank"):
        words += (
            f"\nExtracted with rank {lost['rank']} from weights that were trained whole:"
            f" {lost['squared_change']:.1%} of the squared change is lost, and pictures differ from the student's by"
            f" {lost['images_rms']:.2g} (root mean square) and at most {lost['images']:.2g}.\n"
        )
    if bare := parity.get("without_branch"):
        words += (
            f"\nThat is with the branch on the plain pipeline. Without it latents differ from the student's by at most"
            f" {bare['latents']:.2g} of their peak and pictures by {bare['images']:.2g}.\n"
        )
    return words


def write_card(folder: Path) -> None:
    """Write `folder`/README.md."""
    (folder / "README.md").write_text(text_of(folder), encoding="utf-8")

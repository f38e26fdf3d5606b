"""The house: names others rely on, what is imported when, documents that say what is true."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import onestroke
import onestroke.methods
from onestroke import cli, methods
from onestroke.draws import Draws
from onestroke.method import Batch, Method, Parts, play
from onestroke.paths import EDM, VP, Estimate, Flow
from onestroke.run import COMMON, RECIPES, check_ways, recipe_layers
from onestroke.sampling import FewStep
from onestroke.settings import resolve
from onestroke.teachers import GaussianMixture, built_in

ROOT = Path(__file__).parents[2]
METHOD_FILES = sorted((ROOT / "src" / "onestroke" / "methods").glob("*/*.py"))
PUBLIC = [
    "DivergedError",
    "ExportError",
    "InputError",
    "OnestrokeError",
    "check_lora",
    "distill",
    "export",
    "load_student",
    "load_teacher",
    "merge",
    "negative_prompt",
]
STEER = ["--negative", "--nasa-scale", "--lora", "--lora-scale", "--controlnet", "--control-image", "--control-scale"]
COMMANDS = {
    "demo": ["--out"],
    "distill": [
        "TEACHER",
        "--method",
        "--out",
        "--prompts",
        "--images",
        "--steps",
        "--batch-size",
        "--set",
        "--pairs",
        "--seed",
        "--resume",
    ],
    "plan": ["TEACHER", "--method", "--batch-size", "--resolution", "--memory", "--device", "--set", "--json"],
    "sample": [
        *("MODEL", "PROMPTS", "--steps", "-n", "--seed", "--guidance-scale", "--solver", "--adaptive"),
        *STEER,
        "--out",
    ],
    "check-lora": ["STUDENT", "LORA", "--teacher", "--prompts", "--scale", "--count", "--seed", "--out", "--json"],
    "export": ["MODEL", "--to", "--out", "--dtype", "--rank", "--base"],
    "merge": ["STUDENTS", "--out", "--weight"],
    "methods": ["--json", "--check", "--seconds", "--case"],
    "teachers": ["--json"],
}


def project() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_public_names_are_frozen():
    assert onestroke.__all__ == PUBLIC == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(onestroke, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'destill'"):
        _ = onestroke.destill


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("onestroke.paths", ["VP", "EDM", "Flow", "Trig"]),
        ("onestroke.teachers", ["GaussianMixture", "load_teacher"]),
        ("onestroke.truth", ["converge"]),
    ],
)
def test_names_other_tools_rely_on(module, names):
    assert [n for n in names if not hasattr(importlib.import_module(module), n)] == []


def test_the_command_line_is_frozen():
    import typer.main

    group = typer.main.get_command(cli.app)
    found = {
        name: [p.opts[0] if p.opts[0].startswith("-") else p.opts[0].upper() for p in command.params]
        for name, command in group.commands.items()
    }
    assert found == COMMANDS


def test_importing_onestroke_does_not_import_diffusers():
    code = (
        "import sys, onestroke, onestroke.cli, onestroke.settings, onestroke.teachers, onestroke.methods\n"
        "assert onestroke.load_teacher and onestroke.distill\n"
        "print(sorted({'diffusers', 'transformers', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# ---- packaging -------------------------------------------------------------------------------------------------------


def test_dependencies_stay_few():
    about = project()["project"]
    assert 1 <= len(about["dependencies"]) <= 10
    assert about["requires-python"] == ">=3.10"
    assert "torch>=2.6" in about["dependencies"]
    assert about["version"] == onestroke.__version__
    assert {"metrics", "onnx", "recipes", "dev"} <= about["optional-dependencies"].keys()


def test_documents_name_one_version_and_one_licence():
    version = project()["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert "\nlicense: Apache-2.0\n" in citation
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in licence
    assert len(licence) == 11_358
    notice = (ROOT / "NOTICE").read_text()
    for name in ("Copyright 2026 The onestroke developers", "Twemoji", "CC-BY 4.0", "Noto Emoji", "Fluent Emoji"):
        assert name in notice


def test_every_shipped_recipe_resolves():
    found = sorted(RECIPES.glob("*/*.json"))
    assert found
    for teacher, method in {(p.parent.name, p.stem) for p in found if p.stem != COMMON}:
        cls = methods.get_method(method)
        options = methods.options(cls)
        settings, chosen = resolve({}, options, cls.players, cls.defaults, *recipe_layers(teacher, method))
        assert settings.student_steps <= cls.max_steps
        assert chosen.keys() <= options.keys()
        given = json.loads((RECIPES / teacher / f"{method}.json").read_text())
        for key in given.keys() - {"lr", "betas", "lora_rank", "lora_alpha"}:
            assert (chosen if key in options else vars(settings))[key] == given[key], key


@pytest.mark.parametrize("teacher", built_in())
@pytest.mark.parametrize("method", methods.METHODS)
def test_the_settings_of_a_teacher_are_for_every_method(teacher, method):
    cls = methods.get_method(method)
    settings, _ = resolve({}, methods.options(cls), cls.players, cls.defaults, *recipe_layers(teacher, method))
    assert settings.batch_size <= 96, "as of a large teacher: no machine of two cores would get anywhere"
    assert settings.of("lr", cls.players[0]) >= 1e-5, "as of a large teacher: nothing would move in a short run"
    if "ways" in cls.needs:
        check_ways(settings)
        assert 1000 % settings.solver_steps == 0, "no grid of the teacher's table"


def test_recipes_and_built_in_teachers_go_together():
    assert {path.parent.name for path in RECIPES.glob("*/*.json")} == {*built_in(), "exact"}
    assert recipe_layers(str(RECIPES / "emoji64"), "swiftbrush") == [], "a folder's own files are not settings"


# ---- documents -------------------------------------------------------------------------------------------------------


def test_the_python_of_the_readme_names_what_exists():
    code = blocks("README.md")
    assert len(code) == 2
    tree = ast.parse(code[0])
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "onestroke"
    }
    assert used == {"load_teacher", "distill", "load_student"}
    assert used <= set(onestroke.__all__)
    ast.parse(code[1])


def test_the_readme_runs_on_a_tiny_teacher(pipeline_folder, prompt_file, tmp_path, monkeypatch):
    """The Python of the README, word for word but for the teacher, the prompt file and the number of rounds."""
    monkeypatch.chdir(tmp_path)
    ours, theirs = blocks("README.md")
    for old, new in (
        ('"emoji64"', repr(str(pipeline_folder))),
        ('"prompts.txt"', repr(str(prompt_file))),
        ("steps=400", 'steps=1, batch_size=2, log_with="none"'),
        ("noto, red apple", "a cat on a mat"),
    ):
        assert old in ours
        ours, theirs = ours.replace(old, new), theirs.replace(old, new)
    exec(ours, {})
    from PIL import Image

    drawn = Image.open(tmp_path / "apple.png")
    lines, space = theirs.rstrip().splitlines(), {}
    exec("\n".join([*lines[:-1], "image = " + lines[-1]]), space)
    assert drawn.size == space["image"].size == (16, 16)
    difference = torch.tensor(list(drawn.tobytes())) - torch.tensor(list(space["image"].tobytes()))
    assert difference.abs().max() <= 1


def test_documents_name_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*## ", makefile, re.MULTILINE))
    assert targets == {"help", "demo", "test", "lint", "truth", "bench", "docs"}
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        asked = set(re.findall(r"(?:^ +|`)make ([a-z]+)", text, re.MULTILINE))
        assert asked
        assert asked <= targets
        for word in re.findall(r"onestroke (\w+) (?:--|TEACHER|MODEL|\[--)", text):
            assert word in COMMANDS, word
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            if target not in GENERATED:
                assert (ROOT / target).exists(), f"{document} links to {target}"
    assert "make test" in (ROOT / ".ci" / "run").read_text()


GENERATED = {"docs/demo.png", "docs/truth.md"}  # by make demo and make truth


def test_the_method_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_truth_page_is_what_was_measured_and_with_what(monkeypatch):
    """It names the parts that its settings switch off."""
    monkeypatch.syspath_prepend(ROOT)
    page = importlib.import_module("benchmarks.truth").page(methods.results())
    assert (ROOT / "docs" / "truth.md").read_text(encoding="utf-8") == page, "run python -m benchmarks.truth --methods"
    for method, option in (("ctm", "gan_weight"), ("hyper-sd", "gan_weight"), ("pcm", "gan_weight")):
        assert re.search(rf"^- {method}: .*\*\*{option} 0.0 \(", page, re.MULTILINE)
    assert re.search(r"^- tiue: .*\*\*kl_weight 0.0 \(0.8\)\*\*", page, re.MULTILINE)


def test_contributing_maps_the_source_tree():
    (block,) = re.findall(
        r"^In `src/onestroke`.*?\n\n((?:    .*\n)+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    named = [word for line in block.splitlines() for word in line.strip().split("  ")[0].split()]
    folder = ROOT / "src" / "onestroke"
    found = [p.name + "/" if p.is_dir() else p.stem for p in folder.iterdir() if p.is_dir() or p.suffix == ".py"]
    assert sorted(named) == sorted(set(found) - {"__init__", "__pycache__/"})


def test_contributing_prints_the_rules_of_the_method_class():
    rules = re.findall(r"\((\d)\) (.*?)(?=\s*\(\d\)|\Z)", re.sub(r"\s+", " ", Method.__doc__ or ""))
    printed = re.sub(r"\s+", " ", (ROOT / "CONTRIBUTING.md").read_text()).replace("`", "")
    assert [number for number, _ in rules] == list("1234567")
    for number, rule in rules:
        assert f"{number}. {rule}".replace("`", "") in printed


def own_lines(source: str) -> int:
    """Lines of code, without blank lines, comments, docstrings and imports."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = ((number, line.strip()) for number, line in enumerate(source.splitlines(), 1))
    return sum(bool(line) and not line.startswith("#") and number not in skipped for number, line in lines)


def test_a_method_is_one_short_file():
    long = {p.stem: n for p in METHOD_FILES if (n := own_lines(p.read_text(encoding="utf-8"))) > 80}
    assert len(METHOD_FILES) > 50
    assert long == {}


@pytest.fixture
def sds(tmp_path, monkeypatch):
    """The example of CONTRIBUTING.md as a file in a family folder: that alone must make it a method."""
    (code,) = blocks("CONTRIBUTING.md")
    family = tmp_path / "examples"
    family.mkdir()
    (family / "__init__.py").write_text("")
    (family / "sds.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(onestroke.methods, "__path__", [*onestroke.methods.__path__, str(tmp_path)])
    monkeypatch.setattr(onestroke.methods, "METHODS", methods._files())
    yield "sds"
    for name in [n for n in sys.modules if n.startswith("onestroke.methods.examples")]:
        del sys.modules[name]


def test_the_example_of_contributing_is_a_method(sds, pipeline_folder, prompt_file, tmp_path):
    assert methods.describe(sds)["paper"] == "DreamFusion, arXiv 2209.14988"
    assert methods.describe(sds)["family"] == "examples"
    assert methods.describe(sds)["options"] == {"lo": 0.02, "hi": 0.98}
    student = onestroke.distill(
        str(pipeline_folder),
        method=sds,
        prompts=prompt_file,
        out=tmp_path / "run",
        steps=2,
        batch_size=2,
        guidance_scale=3,
        hi=0.9,
        log_with="none",
    )
    assert student.card["method"] == "sds"
    assert student(["rain"])[0].size == (16, 16)


class Point(torch.nn.Module):
    """A student that draws one point, whatever its noise."""

    def __init__(self, at: list[float]):
        super().__init__()
        self.at = torch.nn.Parameter(torch.tensor(at, dtype=torch.float64))

    def forward(self, x, t, cond):
        return Estimate(self.at.expand_as(x), x)


@pytest.mark.parametrize("path", [VP(), EDM(), Flow()], ids=["vp", "edm", "flow"])
def test_the_example_of_contributing_follows_its_closed_form(sds, path):
    """On a Gaussian the expected update is sigma^2 c a b (x - mean) / (a^2 std^2 + b^2): zero at the mode alone."""
    mean, std, time, size = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.05, 0.5, 4000
    teacher = GaussianMixture(path, mean, std)
    a, b = (float(c) for c in path.ab(torch.tensor([time], dtype=torch.float64)))
    for at in ([1.0, -2.0], [2.0, 1.0]):
        student = Point(at)
        parts = Parts(teacher, student, lambda role: None, FewStep(path), teacher.null)
        method = methods.get_method(sds)(parts, lo=time, hi=time)
        cond = {"label": torch.zeros(size, dtype=torch.int64)}
        draw = Draws(0, 0, size)
        log = play(method, [Batch(torch.zeros(size, 2, dtype=torch.float64), cond, draw)], 0, lambda player: None)
        assert log.keys() == {"student/sds"}
        gap = student.at.detach() - mean[0]
        sigma2 = b**2 / (a**2 + b**2)
        expected = sigma2 * a * b * gap / (a**2 * std**2 + b**2) / 2
        noise = sigma2 * a**2 * std**2 / (a**2 * std**2 + b**2) / 2 / size**0.5
        assert (student.at.grad - expected).abs().max() <= 5 * noise
        if gap.any():
            assert expected.abs().min() > 50 * noise, "the check would not see a wrong sign"

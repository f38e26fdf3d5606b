"""`distill`: a teacher, a method and prompts in; an ordinary one- or few-step pipeline out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from onestroke.errors import InputError, read_json
from onestroke.methods import get_method, options
from onestroke.pairs import about_pairs, check_pairs, make_pairs
from onestroke.settings import Settings, resolve
from onestroke.teachers import locate

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on; written into its folder as recipe.json."""

    teacher: str
    method: str
    prompts: int  # their number
    prompts_sha256: str
    settings: dict[str, Any]
    options: dict[str, Any]
    version: str = metadata.version("onestroke")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_prompts(source: str | Path | list[str]) -> list[str]:
    """One prompt per non-empty line of a UTF-8 file, or a list. Raises InputError for none, or another encoding."""
    if not isinstance(source, (str, Path)):
        lines = list(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise InputError(f"no such prompt file: {path}; give a text file with one prompt per line.")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("the prompt file is empty; give one prompt per line.")
    return prompts


def recipe_defaults(teacher: str, method: str) -> dict[str, Any]:
    """The shipped settings of a method on a built-in teacher; empty for others."""
    path = RECIPES / teacher / f"{method}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def plan_run(
    teacher: str, method: str, prompts: list[str], given: Mapping[str, Any], pairs: bool = False
) -> tuple[Recipe, Settings, dict[str, Any]]:
    """Check everything that can be checked before anything heavy is loaded. Raises InputError."""
    cls = get_method(method)
    settings, chosen = resolve(given, options(cls), cls.players, cls.defaults, recipe_defaults(teacher, method))
    if settings.student_steps > cls.max_steps:
        raise InputError(f"method {method!r} trains at most {cls.max_steps} step(s), not {settings.student_steps}.")
    if cls.needs & {"x0"}:
        raise InputError(f"method {method!r} needs real images, and only prompts were given.")
    if pairs and "pairs" not in cls.needs:
        raise InputError(f"method {method!r} needs no pairs; leave --pairs out.")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return Recipe(teacher, method, len(prompts), digest, asdict(settings), chosen), settings, chosen


def check_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to overwrite. With resume, the folder must hold the same run (a larger `steps` continues it)."""
    known = out / "recipe.json"
    if not resume:
        # pairs alone: a run that was cut off while it made them
        if out.is_file() or (out.is_dir() and any(p.name != "pairs" for p in out.iterdir())):
            raise InputError(f"{out} is not empty; choose another --out, or continue its run with --resume.")
        if file := next((p for p in out.parents if p.is_file()), None):
            raise InputError(f"{out} cannot be made: {file} is a file; choose another --out.")
        return
    if not known.is_file():
        raise InputError(f"{out} holds no run to resume (no recipe.json); start without --resume.")
    before, now = read_json(known), json.loads(json.dumps(asdict(recipe)))
    for key in ("teacher", "method", "prompts_sha256", "options"):
        if before.get(key) != now[key]:
            raise InputError(f"{out} holds another run: its {key} is {before.get(key)!r}, not {now[key]!r}.")
    for key, value in now["settings"].items():
        old = before.get("settings", {}).get(key)
        if key not in ("steps", "save_every") and old != value:
            raise InputError(f"{out} holds another run: its setting {key} is {old!r}, not {value!r}.")


def distill(
    teacher: Any,
    *,
    method: str,
    prompts: str | Path | list[str],
    out: str | Path,
    pairs: str | Path | None = None,
    resume: bool = False,
    **settings: Any,
):
    """Distil `teacher` into a one- or few-step student by `method`, and write it to `out` as a diffusers pipeline.

    teacher: a built-in name, a pipeline folder, a hub id, or what `load_teacher` returned. prompts: a UTF-8 file with
    one prompt per line, or a list. pairs: a folder of pairs of the teacher's solver, for the methods that need them;
    what it lacks is made there (default: `pairs` in `out`). settings: trainer settings (see
    `onestroke.settings.Settings`; per-player ones take a number or {player: number}) and the method's own options.
    Returns the loaded student.

    Raises InputError before anything heavy is loaded, DivergedError when a loss is not finite.
    """
    out, name = Path(out), getattr(teacher, "name", None) or str(teacher)
    lines = read_prompts(prompts)
    recipe, run, chosen = plan_run(name, method, lines, settings, pairs is not None)
    kept, about = Path(pairs or out / "pairs"), about_pairs(recipe.prompts_sha256, run)
    check_pairs(kept, about)
    if not hasattr(teacher, "net"):
        source = locate(teacher)
        if isinstance(source, Path):
            from onestroke.teachers.pipeline import inspect_folder

            inspect_folder(source)
    check_folder(out, recipe, resume)

    from onestroke.method import Parts
    from onestroke.roles import make_role
    from onestroke.sampling import FewStep
    from onestroke.student import load_student, save_student
    from onestroke.teachers import load_teacher
    from onestroke.train import Data, Trainer

    torch.manual_seed(run.seed)
    if not hasattr(teacher, "net"):
        teacher = load_teacher(teacher)
    few = FewStep(teacher.path, teacher.path.grid(run.student_steps))

    def copy_of_teacher(role: str):
        return make_role(teacher.net, role, run)

    student = copy_of_teacher("student")
    parts = Parts(teacher.net, student, copy_of_teacher, few, teacher.null, run.guidance_scale, teacher.shape)
    cond, made = teacher.encode(lines), None
    if "pairs" in get_method(method).needs:
        made = make_pairs(parts, cond, about, kept, run.pair_count, run.batch_size)
    data = Data(teacher.shape, cond, pairs=made)
    trainer = Trainer(get_method(method)(parts, **chosen), data, run, out)
    if resume:
        trainer.resume()
    if trainer.accelerator.is_main_process:
        recipe.save(out)
    trainer.run()
    student = trainer.finish()
    if trainer.accelerator.is_main_process:
        card = {"method": method, "teacher": name, "rounds": trainer.round, "seconds": round(trainer.seen, 1)}
        save_student(teacher, student, few, out, card)
    trainer.accelerator.wait_for_everyone()
    return load_student(out)

"""`distill`: a teacher, a method and prompts in; an ordinary one- or few-step pipeline out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from onestroke.denoiser import no_halves
from onestroke.errors import InputError, read_json, read_text
from onestroke.images import Pictures, encoded, read_images
from onestroke.methods import get_method, options
from onestroke.pairs import about_pairs, check_pairs, make_pairs
from onestroke.rewards import Score, check_reward
from onestroke.settings import Settings, resolve
from onestroke.teachers import fetched, locate
from onestroke.training.optim import check_optimizer

RECIPES = Path(__file__).parent / "recipes"
SHIPPED = {path.name for path in RECIPES.iterdir()}
COMMON = "common"


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on; written into its folder as recipe.json."""

    teacher: str
    method: str
    prompts: int  # their number
    prompts_sha256: str
    settings: dict[str, Any]
    options: dict[str, Any]
    images_sha256: str | None = None  # of the pictures and their captions
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
        lines = read_text(path).splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("the prompt file is empty; give one prompt per line.")
    return prompts


def read_shares(folder: Path) -> tuple[list[str], list[int]]:
    """The prompts of a folder of prompt files, and the number of the file of each: every file is a student's share.

    Raises InputError for fewer than two files, and for a prompt in two of them.
    """
    files = sorted(folder.glob("*.txt"))
    if len(files) < 2:
        raise InputError(f"{folder} holds {len(files)} prompt files (*.txt); give one per student, two or more.")
    found: dict[str, int] = {}
    for k, file in enumerate(files):
        for line in read_prompts(file):
            if found.setdefault(line, k) != k:
                raise InputError(f"{line!r} stands in {files[found[line]].name} and in {file.name}; leave one out.")
    return list(found), list(found.values())


def recipe_layers(teacher: str, method: str) -> list[dict[str, Any]]:
    """The shipped settings on a built-in teacher, later ones win: those of every method, and this one's. For other
    teachers they are empty.

    What is said of a player counts for the methods that have it.
    """
    if teacher not in SHIPPED:
        return []
    files = [RECIPES / teacher / f"{name}.json" for name in (COMMON, method)]
    common, own = (json.loads(file.read_text()) if file.is_file() else {} for file in files)
    players = ("*", *get_method(method).players)
    tables = {k: v for k, v in common.items() if isinstance(v, dict)}
    return [common | {k: {p: e for p, e in v.items() if p in players} for k, v in tables.items()}, own]


def plan_run(
    teacher: str,
    method: str,
    prompts: list[str],
    given: Mapping[str, Any],
    pictures: Pictures | None = None,
    pairs: bool = False,
) -> tuple[Recipe, Settings, dict[str, Any]]:
    """Check everything that can be checked before anything heavy is loaded. Raises InputError."""
    cls = get_method(method)
    settings, chosen = resolve(given, options(cls), cls.players, cls.defaults, *recipe_layers(teacher, method))
    if settings.student_steps > cls.max_steps:
        raise InputError(f"method {method!r} trains at most {cls.max_steps} step(s), not {settings.student_steps}.")
    if settings.renoise == "fixed" and settings.student_steps > 1:
        raise InputError("renoise='fixed' has no standard diffusers scheduler; use fresh or implied.")
    every = {**options(cls), **chosen}
    needs = cls.needs_of(every)
    check_options(every)
    if "x0" in needs and pictures is None:
        raise InputError(f"method {method!r} needs real images with captions; give them by --images.")
    if "times" in needs and settings.students > 1 and settings.student_steps > 1:
        raise InputError("several students draw at the same times; choose options that leave them the usual ones.")
    if "steering" in needs and settings.gradient_checkpointing:
        raise InputError("negative prompts in training go without gradient_checkpointing; leave it out.")
    if "branch" in needs and settings.gradient_checkpointing:
        raise InputError(
            "a negative-prompt branch goes without gradient_checkpointing; leave it out, or set branch=false, which is "
            "the same for a network without cross-attention."
        )
    if "branch" in needs and settings.layers < 1:
        raise InputError(
            f"a negative-prompt branch stands beside all layers of the teacher; leave layers={settings.layers} out, or "
            "set branch=false."
        )
    if settings.reward and "reward" not in needs:
        raise InputError(f"method {method!r} reads no reward; leave reward={settings.reward!r} out.")
    if pairs and not needs & {"pairs", "ways"}:
        raise InputError(f"method {method!r} needs no pairs; leave --pairs out.")
    if "ways" in needs:
        check_ways(settings)
    if settings.guide != "full":
        check_guide(settings, needs)
    if settings.guidance_scale == 1 and cls.target.startswith("guided"):
        raise InputError(f"method {method!r} distils guidance, and guidance_scale=1 is none; set one above 1.")
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    images = None if pictures is None else pictures.sha256
    return Recipe(teacher, method, len(prompts), digest, asdict(settings), chosen, images), settings, chosen


def check_options(every: Mapping[str, Any]) -> None:
    """Refuse what no method's options can be: negative numbers of things, an empty span of times. Raises InputError."""
    for name, value in every.items():
        if type(value) is int and value < 0:
            raise InputError(f"{name}={value} counts something; it must not be negative.")
    if {"lo", "hi"} <= every.keys() and not 0 <= every["lo"] < every["hi"] <= 1:
        raise InputError(f"lo={every['lo']} and hi={every['hi']} must lie in [0, 1], lo below hi.")


def check_ways(run: Settings) -> None:
    """Refuse ways that a student's own calls do not lie on. Raises InputError."""
    if run.solver != "ddim":
        raise InputError(f"the teacher's ways are of DDIM steps; set solver=ddim instead of {run.solver}.")
    if run.solver_steps % run.student_steps:
        raise InputError(
            f"solver_steps={run.solver_steps} must be a multiple of student_steps={run.student_steps}: a student is "
            "called at states of the teacher's ways."
        )


def check_guide(run: Settings, needs: AbstractSet[str]) -> None:
    """Refuse a guide of pairs that are not made, or not by it. Raises InputError."""
    if not needs & {"pairs", "ways"}:
        raise InputError(f"guide={run.guide} is of pairs and ways, and this method needs none; leave it out.")
    if run.guidance_scale == 1:
        raise InputError(f"guidance_scale=1 is none, and guide={run.guide} has nothing to spare; set one above 1.")
    if "ways" in needs and run.guide == "linear":
        raise InputError("guide=linear is of pairs, and this method needs ways; set guide=adaptive, or leave it out.")
    if "sides" in needs:
        raise InputError(f"guide={run.guide} is of one guidance for all; set spread=0, or leave it out.")


def check_machine(run: Settings) -> None:
    """Refuse what is not installed, or not for several processes. Raises InputError."""
    check_optimizer(run.optimizer)
    if run.offload and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("offload=true is for one process; use shard=true for several.")


def check_network(source: str | Path, needs: Collection[str]) -> None:
    """Refuse a pipeline, in a folder or of a hub id, whose network or call lacks what a method needs, from its small
    files. Raises InputError."""
    from onestroke.teachers.nasa import check_steerable
    from onestroke.teachers.pipeline import class_of, declared_in, hollow_network, network_of, schedule_in, time_keyword

    part, network = network_of(source)
    if "halves" in needs and part == "transformer":
        raise no_halves(network.__name__)
    if "times" in needs:
        time_keyword(class_of(declared_in(source)["_class_name"], source), schedule_in(source)[1] == "flow")
    if "steering" in needs:
        check_steerable(hollow_network(source))


def rehearse(method: str, run: Settings, options: Mapping[str, Any], path: Any, prediction: Any) -> Any:
    """The method, built on a small net of the teacher's path, for what it and its times refuse. Raises InputError."""
    import copy

    from onestroke.method import Parts
    from onestroke.sampling import FewStep
    from onestroke.teachers.pipeline import check_grid
    from onestroke.truth import Net

    net, null = Net(path, prediction, 2, 1, 1.0, width=8), {"label": torch.tensor([-1])}
    few = FewStep(path, path.grid(run.student_steps), renoise=run.renoise)
    parts = Parts(
        net,
        net,
        lambda role: copy.deepcopy(net),
        few,
        null,
        run.guidance_scale,
        shape=(2,),
        reward=lambda x0, cond: x0.sum(1),
        rounds=run.steps,
        encode=lambda texts: {"label": torch.zeros(len(texts), dtype=torch.int64)},
        conditions=null,
        solver_steps=run.solver_steps,
    )
    made = get_method(method)(parts, **options)
    check_grid(path, getattr(made, "few", few))
    if (last := max(made.phases, default=0)) >= run.steps:
        raise InputError(
            f"the last phase of {method!r} begins after {last} rounds, and the run has {run.steps}; raise steps, or "
            f"lower the options that say when (onestroke methods {method})."
        )
    return made


def check_init(run: Settings) -> None:
    """Refuse a student that another cannot begin from, by its small files. Raises InputError."""
    from onestroke.students.student import read_card
    from onestroke.teachers.branch import BRANCH

    card = read_card(Path(run.init))
    if (layers := card.get("layers", 1.0)) != run.layers:
        raise InputError(f"{run.init} has layers={layers} of its teacher's; set that, not layers={run.layers}.")
    if run.of("lora_rank", "student", 0):
        raise InputError("a student with LoRA begins at its teacher; leave init or lora_rank.student out.")
    if run.students > 1:
        raise InputError(f"students={run.students} begin at their teacher; leave init out.")
    if (Path(run.init) / BRANCH).is_file():
        raise InputError(f"{run.init} is its teacher with a negative-prompt branch, not a student to go on from.")


def check_several(run: Settings, prompts: list[str], owners: list[int] | None, more: bool) -> None:
    """Refuse a partition that cannot be; `more`, that pictures or pairs were given. Raises InputError."""
    if more:
        raise InputError(f"students={run.students} learn from --prompts alone; leave images and pairs out.")
    if owners is not None and run.students != max(owners) + 1:
        raise InputError(f"students={run.students}, and there are {max(owners) + 1} prompt files; leave students out.")
    if (known := len(set(prompts))) < run.students:
        raise InputError(f"{known} distinct prompts are too few for students={run.students}.")


def check_empty(out: Path, hint: str = "", besides: str = "") -> None:
    """Refuse to write where something is; `besides`, the one name that may be there (a run cut off at its pairs has
    them alone). Raises InputError."""
    if out.is_file() or (out.is_dir() and any(p.name != besides for p in out.iterdir())):
        raise InputError(f"{out} is not empty; choose another --out{hint}.")
    if file := next((p for p in out.parents if p.is_file()), None):
        raise InputError(f"{out} cannot be made: {file} is a file; choose another --out.")


def check_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to overwrite. With resume, the folder must hold the same run (a larger `steps` continues it)."""
    known = out / "recipe.json"
    if not resume:
        return check_empty(out, ", or continue its run with --resume", besides="pairs")
    if not known.is_file():
        raise InputError(f"{out} holds no run to resume (no recipe.json); start without --resume.")
    before, now = read_json(known), json.loads(json.dumps(asdict(recipe)))
    for key in ("teacher", "method", "prompts_sha256", "images_sha256", "options"):
        if before.get(key) != now[key]:
            raise InputError(f"{out} holds another run: its {key} is {before.get(key)!r}, not {now[key]!r}.")
    for key, value in now["settings"].items():
        old = before.get("settings", {}).get(key)
        if key not in ("steps", "save_every") and old != value:
            raise InputError(f"{out} holds another run: its setting {key} is {old!r}, not {value!r}.")


def check_length(now: Any, before: Any) -> None:
    """Refuse to go on for another number of rounds with a method that has cut its run by them: `now` and `before`, the
    same method of both numbers. Raises InputError."""
    for name, value in vars(now).items():
        if isinstance(value, (int, tuple)) and value != vars(before)[name]:
            raise InputError(
                f"the method has cut its run by its rounds: {name} was {vars(before)[name]} and would be {value}. Keep "
                "steps, or begin anew with such options set."
            )


def parts_of(teacher: Any, run: Settings, null: Any = None, reward: Any = None, cond: Any = None) -> Any:
    """What methods are built from, for a loaded teacher: Parts."""
    from onestroke.method import Parts
    from onestroke.sampling import FewStep
    from onestroke.training.roles import make_role

    few = FewStep(teacher.path, teacher.path.grid(run.student_steps), renoise=run.renoise)

    def role(name: str):
        return make_role(teacher.net, name, run)

    scale, null = run.guidance_scale, teacher.null if null is None else null
    more = (teacher.shape, reward, run.steps, teacher.conditions, cond, run.solver_steps)
    return Parts(teacher.net, role("student"), role, few, null, scale, *more)


def distill(
    teacher: Any,
    *,
    method: str,
    out: str | Path,
    prompts: str | Path | list[str] | None = None,
    images: str | Path | None = None,
    pairs: str | Path | None = None,
    resume: bool = False,
    reward: str | Score = "",
    **settings: Any,
):
    """Distil `teacher` into a one- or few-step student by `method`, and write it to `out` as a diffusers pipeline.

    teacher: a built-in name, a pipeline folder, a hub id, or what `load_teacher` returned. prompts: a UTF-8 file with
    one prompt per line, a list, or a folder of such files, each of which gets a student of its own (see
    `onestroke.several`). images, instead: a folder of pictures with captions, which are then the prompts (see
    `onestroke.images.read_images`). pairs: a folder of pairs of the teacher's solver, or of its whole ways, for the
    methods that need them; what it lacks is made there (default: `pairs` in `out`). reward, for the methods that need
    one: "clip:<folder or hub id>", or a differentiable function of images (B, 3, H, W) in [0, 1] and their prompts to
    (B,), larger is better; by default the teacher's own pair of towers. settings: trainer settings (see
    `onestroke.settings.Settings`; per-player ones take a number or {player: number}) and the method's own options.
    Returns the loaded student.

    Beside the pipeline stand its model card and parity.json: it is drawn with by plain diffusers and compared with the
    sampler of training.

    Raises InputError before anything heavy is loaded, DivergedError when a loss is not finite, ExportError when that
    comparison fails.
    """
    out, name, cls = Path(out), getattr(teacher, "name", None) or str(teacher), get_method(method)
    if (prompts is None) == (images is None):
        raise InputError("give either --prompts, or --images, whose captions are the prompts.")
    pictures = None if images is None else read_images(images)
    owners: list[int] | None = None
    if pictures is not None:
        lines = pictures.captions
    elif isinstance(prompts, (str, Path)) and Path(prompts).is_dir():
        lines, owners = read_shares(Path(prompts))
        settings = {"students": max(owners) + 1, **settings}
    else:
        lines = read_prompts(prompts or [])
    judged = reward if isinstance(reward, str) else getattr(reward, "__qualname__", type(reward).__qualname__)
    given = settings | ({"reward": judged} if judged else {})
    recipe, run, chosen = plan_run(name, method, lines, given, pictures, pairs is not None)
    check_machine(run)
    needs = cls.needs_of({**options(cls), **chosen}) - ({"times"} if run.student_steps == 1 else set())
    spread = float({**options(cls), **chosen}["spread"]) if "sides" in needs else 0.0
    kept, about = Path(pairs or out / "pairs"), about_pairs(recipe.prompts_sha256, run, "ways" in needs, spread)
    loaded = hasattr(teacher, "net")
    source = teacher if loaded else locate(teacher)
    from onestroke.guidance import check_asks_twice
    from onestroke.solvers import stops
    from onestroke.teachers.pipeline import files_sha256, hollow_network, inspect_folder, schedule_in

    if isinstance(source, Path):
        inspect_folder(source)
    if not loaded:
        check_network(source, needs)
        if run.guide != "full":
            check_asks_twice(source)
    path, prediction = (teacher.path, teacher.net.prediction) if loaded else schedule_in(source)
    check_pairs(kept, about)
    rehearsed = rehearse(method, run, chosen, path, prediction)
    if "ways" in needs:
        stops(path, run.solver_steps)  # refuses steps that the path has no times for
    if run.layers < 1 and not loaded:
        from onestroke.teachers.depth import with_fewer_layers

        with_fewer_layers(hollow_network(source), run.layers)
    if "reward" in needs:
        check_reward(reward or run.reward, source)
    if run.students > 1 or owners is not None:
        check_several(run, lines, owners, pictures is not None or pairs is not None)
    if run.init:
        check_init(run)
    check_folder(out, recipe, resume)
    if resume and (before := read_json(out / "recipe.json")["settings"]["steps"]) != run.steps:
        check_length(rehearsed, rehearse(method, replace(run, steps=before), chosen, path, prediction))
    files = files_sha256(fetched(source)) if needs & {"pairs", "ways"} and not loaded else ""
    check_pairs(kept, about, files)

    from onestroke.denoiser import plain
    from onestroke.rewards import KEY, load_reward
    from onestroke.students.model_card import licence_of, write_card
    from onestroke.students.parity import check_pipeline, open_plain
    from onestroke.students.student import fingerprint, load_student, save_student
    from onestroke.teachers import load_teacher
    from onestroke.training.train import Data, Trainer

    torch.manual_seed(run.seed)
    if not loaded:
        teacher = load_teacher(teacher, run.size)
    elif run.size not in (None, teacher.size):
        raise InputError(f"the teacher was loaded for pictures of {teacher.size} pixels, not {run.size}.")
    if run.students > 1:
        from onestroke.several import distill_several

        each = partial(distill, method=method, reward=reward, **settings | {"students": 1})
        return distill_several(teacher, lines, owners, run, recipe, out, resume, each)
    cond = teacher.conditions(lines)
    null, judge, x0 = teacher.null, None, None
    if "reward" in needs:
        judge = load_reward(reward or run.reward, teacher)
        cond, null = {**cond, KEY: judge.encode(lines)}, {**null, KEY: judge.encode([""])}
    if pictures is not None and "x0" in needs:
        x0 = encoded(teacher, pictures, out / "images.safetensors")
    parts = parts_of(teacher, run, null, judge, cond)
    if run.init:
        first = load_student(run.init)
        if first.card.get("teacher_fingerprint") != fingerprint(teacher.net):
            raise InputError(f"{run.init} is a student of {first.card.get('teacher')!r}, whose weights are others.")
        parts.student.load_state_dict(first.model.net.state_dict())
    playing = cls(parts, **chosen)
    teacher.student_scheduler(getattr(playing, "few", parts.few))  # refuses calls that no pipeline could repeat
    if "times" in needs:
        teacher.own_times(parts.few)  # refuses a pipeline that takes none
    solved, ways = None, None
    if needs & {"pairs", "ways"}:
        solved, ways = make_pairs(parts, cond, about, kept, run.pair_count, run.batch_size, files)
    teacher.park()
    trainer = Trainer(playing, Data(teacher.shape, cond, x0, solved, ways), run, out)
    if resume:
        trainer.resume()
    if trainer.accelerator.is_main_process:
        recipe.save(out)
    trainer.run()
    few = getattr(playing, "few", parts.few)  # as the method calls it now: times may be found by training
    student = trainer.finish()
    if trainer.accelerator.is_main_process:
        card = {"method": method, "teacher": name, "rounds": trainer.round, "seconds": round(trainer.seen, 1)}
        card |= {"layers": run.layers} if run.layers < 1 else {}
        save_student(teacher, student, few, out, {**card, "teacher_licence": licence_of(name)}, playing.guidance)
        check_pipeline(out, open_plain(out), teacher, plain(student), few, "diffusers")
        write_card(out)
    trainer.accelerator.wait_for_everyone()
    return load_student(out)

"""What every method makes of a built-in teacher in the same short run: KID and retrieval of its one-step pictures.

Each method is distilled with the shipped settings of this teacher, as `onestroke distill` does by itself. Its row goes
to OUT/rows when it is done, and those already there are kept: the same command continues an interrupted table, and
several may fill one table with different methods. With --draw-steps the students that stand in OUT are drawn in other
numbers of steps as well, each in a row of its own; with --init a method goes on from the finished student of another.
With --write the rows go into docs/images.json, over the older ones of these methods, and docs/images.md is written from
that.

    python recipes/emoji64/table.py --data DATA --out runs/table [--teacher emoji64] [--methods dmd2 sid ...] [--write]
                                    [--draw-steps 2 4] [--init kd]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from common import caption, load_data, posed, to_float
from PIL import Image

from onestroke import distill, load_student, load_teacher
from onestroke.demo import SCORE_SEED, draw_all, from_student, from_teacher
from onestroke.errors import InputError
from onestroke.methods import METHODS, get_method, options, shown_needs
from onestroke.metrics import LiteFeatures, kid, machine, reference_features, retrieval
from onestroke.run import read_prompts
from onestroke.teachers import BUILT_IN

DOCS = Path(__file__).parents[2] / "docs"
STEPS = (1, 2, 4, 10, 25)
"""In which the teacher itself is drawn."""
HEAD = """# Images

What every method makes of a built-in teacher in a short run, with the settings that `onestroke distill` takes by itself
(`src/onestroke/recipes`), whose **rounds** are the budget. Written by `recipes/emoji64/table.py --write`.

Each student draws {count} prompts of the teacher's own list in its number of **steps**; where it was trained for
another number, the table says so. "m from k" began as the student that k left, as the papers of ADM and NitroFusion
begin with a student of few steps. **KID** is on EfficientNet-Lite0 features against real images (smaller is better),
**retrieval** how often a picture finds its prompt among all (larger is better), **gain** the KID of the teacher's one
step without guidance over the student's; the aim is 2 in one step. What a student gains in more steps is to be seen
beside the teacher's in as many: agd and lora-enhanced are cheaper teachers, which draw in many, and speedupnet in few.
**seconds** of distilling are by the clock, with whatever else the machine did. The settings of scm, rcm, sana-sprint,
meanflow and imf take derivatives as long differences, `difference=0.1`, not in forward mode, with which these
teachers, not made smooth in time, gave less (see recipes/emoji64/README.md). Every row is one seed, and the settings
were chosen on these very prompts: near 2 the next run may fall on the other side.
"""
TEACHER = """
## {name}

The teacher itself, as its pipeline draws, KID and retrieval by the number of steps:

| steps |{head}
|---|{rule}
| under guidance |{guided}
| without |{plain}

Without guidance in many steps is what ct, ict and ect can come to at best: they learn from images alone.

| method | needs | steps | rounds | KID | gain | retrieval | seconds | measured |
|---|---|---|---|---|---|---|---|---|
"""


def own(steps: int, guided: bool) -> str:
    """The name of a row of the teacher itself."""
    return f"teacher, {steps} steps" + ("" if guided else ", unguided")


def itself(name: str, rows: dict[str, Any]) -> str:
    """What the page says of the teacher itself."""
    lines = [[rows[own(steps, guided)] for steps in STEPS] for guided in (True, False)]
    guided, plain = ("".join(f" {row['kid']:.3f}, {row['retrieval']:.3f} |" for row in line) for line in lines)
    head, rule = "".join(f" {steps} |" for steps in STEPS), "---|" * len(STEPS)
    return TEACHER.format(name=name, head=head, rule=rule, guided=guided, plain=plain)


def page(tables: dict[str, dict[str, Any]], count: int) -> str:
    """docs/images.md of the rows by teacher and name."""
    parts, machines = [HEAD.format(count=count)], list[str]()
    for teacher, rows in sorted(tables.items()):
        one = rows[own(1, False)]
        parts.append(itself(teacher, rows))
        for method, row in sorted(rows.items()):
            if "needs" not in row:
                continue
            if row["on"] not in machines:
                machines.append(row["on"])
            steps = f"{row['drawn']} (trained for {row['student_steps']})" if "drawn" in row else row["student_steps"]
            parts.append(
                f"| {method.split(',')[0]} | {', '.join(row['needs'])} | {steps} | {row['rounds']} "
                f"| {row['kid']:.3f} | {one['kid'] / row['kid']:.2f} | {row['retrieval']:.3f} | {row['seconds']} "
                f"| {row['date']} ({machines.index(row['on']) + 1}) |\n"
            )
    parts += ["\n", *(f"({i}) {name}\n" for i, name in enumerate(machines, 1))]
    return "".join(parts)


def write_images(data: Path, folder: Path) -> Path:
    """The seen images, each in a pose of its own, and their captions as a folder that `distill(images=...)` reads."""
    if not (folder / "metadata.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images, rows, held = load_data(data)
        torch.manual_seed(0)
        drawn = torch.cat([posed(to_float(part)) for part in images.split(256)]).add(1).mul(127.5).round().byte()
        lines = []
        for k in (~held).nonzero()[0]:
            Image.fromarray(drawn[k].permute(1, 2, 0).numpy()).save(folder / f"{k:05}.png")
            lines.append(json.dumps({"file_name": f"{k:05}.png", "text": caption(rows[k])}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", default="emoji64")
    parser.add_argument("--methods", nargs="*", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--rounds", type=int, help="instead of the settings'")
    parser.add_argument("--student-steps", type=int, help="instead of the settings', in a row of its own")
    parser.add_argument("--init", choices=sorted(METHODS), help="begin as the finished student of this one")
    parser.add_argument("--draw-steps", nargs="*", type=int, default=[], help="of the finished students")
    parser.add_argument("--count", type=int, default=300, help="prompts that are scored")
    parser.add_argument("--write", action="store_true", help="into docs")
    args = parser.parse_args()
    folder = BUILT_IN / args.teacher
    prompts, rows = read_prompts(folder / "prompts.txt"), args.out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(SCORE_SEED))[: args.count]
    scored = [prompts[i] for i in order]
    extract, (reference, _) = LiteFeatures(), reference_features(args.teacher)
    towers, teacher = load_teacher("emoji64").pipeline, load_teacher(args.teacher)

    def score(draw) -> dict[str, float]:
        pictures, _ = draw_all(draw, scored)
        return {"kid": kid(extract.of(pictures), reference), "retrieval": retrieval(towers, pictures, scored)}

    def keep(name: str, row: dict[str, Any]) -> None:
        (rows / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)

    def known(name: str) -> bool:
        return (rows / f"{name}.json").is_file()

    scale = json.loads((folder / "onestroke.json").read_text())["guidance_scale"]
    for steps, guided in itertools.product(STEPS, (True, False)):
        if not known(own(steps, guided)):
            keep(own(steps, guided), score(from_teacher(teacher, steps, scale if guided else 1.0)))

    def keep_student(name: str, out: Path, steps: int | None = None) -> None:
        student = load_student(out)
        about = {k: student.card[k] for k in ("student_steps", "rounds")} | ({"drawn": steps} if steps else {})
        cls, chosen = get_method(student.card["method"]), json.loads((out / "recipe.json").read_text())["options"]
        about |= {"needs": shown_needs(cls.needs_of(options(cls) | chosen)), "seconds": round(student.card["seconds"])}
        figures = score(from_student(student, steps))
        keep(name, {**figures, **about, "date": str(datetime.date.today()), "on": machine()})

    for method in args.methods:
        name = method if args.init is None else f"{method} from {args.init}"
        name += f", {args.student_steps} steps" if args.student_steps else ""
        if known(name):
            continue
        source = {"prompts": folder / "prompts.txt"}
        if "x0" in get_method(method).needs:
            source = {"images": write_images(args.data, args.out / "images")}
        init = args.init and str(args.out / args.init)
        chosen = {"steps": args.rounds, "student_steps": args.student_steps, "init": init}
        settings = {"log_with": "none"} | {k: v for k, v in chosen.items() if v is not None}
        out = args.out / name
        try:
            distill(args.teacher, method=method, out=out, resume=(out / "recipe.json").is_file(), **source, **settings)
        except InputError as error:
            keep(name, {"refused": str(error)})
            continue
        keep_student(name, out)
    for method, steps in itertools.product(args.methods, args.draw_steps):
        out, name = args.out / method, f"{method}, drawn in {steps}"
        if known(method) and not known(name) and (out / "onestroke.json").is_file():
            keep_student(name, out, steps)

    if args.write:
        file = DOCS / "images.json"
        tables = json.loads(file.read_text()) if file.is_file() else {}
        tables.setdefault(args.teacher, {}).update(
            {p.stem: json.loads(p.read_text()) for p in sorted(rows.glob("*.json"))}
        )
        file.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")
        (DOCS / "images.md").write_text(page(tables, args.count), encoding="utf-8")


if __name__ == "__main__":
    main()

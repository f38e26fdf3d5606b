"""What every method makes of a built-in teacher in the same short run: KID and retrieval of its one-step pictures.

Each method is distilled with the shipped settings of this teacher, as `onestroke distill` does by itself. Its row goes
to OUT/rows when it is done, and those already there are kept: an interrupted table is continued by the same command,
and several may fill one table with different methods. The page is written from these rows.

    python recipes/emoji64/table.py --data DATA --out runs/table [--teacher emoji64] [--methods dmd2 sid ...]
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from common import caption, load_data, posed, to_float
from PIL import Image

from onestroke import distill, load_student, load_teacher
from onestroke.demo import SCORE_SEED, draw_all, samplers
from onestroke.errors import InputError
from onestroke.methods import METHODS, get_method
from onestroke.metrics import LiteFeatures, kid, machine, reference_features, retrieval
from onestroke.run import read_prompts
from onestroke.teachers import BUILT_IN

HEAD = """# Methods on {teacher}

One step of the student of each method after a short run, on {count} prompts of the teacher's own list: KID on
EfficientNet-Lite0 features against real images (smaller is better) and retrieval (larger is better). The teacher:
{steps} steps {many[kid]:.3f} and {many[retrieval]:.3f}, one step {one[kid]:.3f} and {one[retrieval]:.3f}.
`gain` is the teacher's one-step KID over the student's.

| method | needs | rounds | KID | gain | retrieval | seconds |
|---|---|---|---|---|---|---|
"""


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
    parser.add_argument("--count", type=int, default=300, help="prompts that are scored")
    parser.add_argument("--page", type=Path, help="where the table is written in words")
    args = parser.parse_args()
    folder = BUILT_IN / args.teacher
    prompts, rows = read_prompts(folder / "prompts.txt"), args.out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(SCORE_SEED))[: args.count]
    chosen = [prompts[i] for i in order]
    extract, (reference, _) = LiteFeatures(), reference_features(args.teacher)
    towers, teacher = load_teacher("emoji64").pipeline, load_teacher(args.teacher)
    images = write_images(args.data, args.out / "images")

    def score(draw) -> dict[str, float]:
        pictures, _ = draw_all(draw, chosen)
        return {"kid": kid(extract.of(pictures), reference), "retrieval": retrieval(towers, pictures, chosen)}

    def keep(name: str, row: dict[str, Any]) -> None:
        (rows / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)

    def known(name: str) -> bool:
        return (rows / f"{name}.json").is_file()

    scale = json.loads((folder / "onestroke.json").read_text())["guidance_scale"]
    two = list(samplers(teacher, None, scale).items())[:2]
    for name, draw in two:
        if not known(name):
            keep(name, score(draw))
    for method in args.methods:
        if known(method):
            continue
        source = {"images": images} if "x0" in get_method(method).needs else {"prompts": folder / "prompts.txt"}
        settings = {"log_with": "none"} | ({"steps": args.rounds} if args.rounds else {})
        out = args.out / method
        try:
            distill(args.teacher, method=method, out=out, resume=(out / "recipe.json").is_file(), **source, **settings)
        except InputError as error:
            keep(method, {"refused": str(error)})
            continue
        student = load_student(out)
        *_, draw = samplers(teacher, student, scale).values()
        needs, seconds = sorted(get_method(method).needs), round(student.card["seconds"])
        about = {"needs": needs, "seconds": seconds, "rounds": student.card["rounds"]}
        keep(method, {**score(draw), **about, "date": str(datetime.date.today()), "on": machine()})

    table = {path.stem: json.loads(path.read_text()) for path in rows.glob("*.json")}
    many, one = (table[name] for name, _ in two)
    lines = [
        f"| {name} | {', '.join(row['needs']) or 'prompts'} | {row['rounds']} | {row['kid']:.3f} "
        f"| {one['kid'] / row['kid']:.2f} | {row['retrieval']:.3f} | {row['seconds']} |"
        for name, row in sorted(table.items())
        if "needs" in row
    ]
    head = HEAD.format(teacher=args.teacher, count=args.count, steps=25, many=many, one=one)
    foot = f"Made by `recipes/emoji64/table.py` on {datetime.date.today()}: {machine()}."
    page = head + "\n".join(lines) + f"\n\n{foot}\n"
    if args.page:
        args.page.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()

"""Do more steps help? Distil a ring without labels in 1, 2 and 4 steps by every method that can; write docs/steps.md.

python -m benchmarks.steps [--rounds 150] [--methods dmd2 ...] [--seed 0]

Each result goes into docs/steps.json, over the older one of the same method, and the page is written from that file.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from onestroke.methods import METHODS, get_method
from onestroke.metrics import machine
from onestroke.paths import EDM
from onestroke.truth import converge, ring

FILE, PAGE = Path("docs/steps.json"), Path("docs/steps.md")
STEPS = (1, 2, 4)
HEAD = """# Few steps

A ring of 8 Gaussians as in [truth.md](truth.md), but without labels: one call, which is smooth, cannot cut it apart,
and more can. Every method that trains several steps distils it anew in each number of them, with as many **rounds** of
256 samples for each step: a short run, made to compare the columns, not the methods. Those that only make guidance
cheaper are left out, and so is guided-distillation, whose stage of guidance alone is longer. Written by
`python -m benchmarks.steps`.

The figures are the sliced-W2 of 20,000 samples to the truth over that of two true samples; in brackets, of the fitted
network in as many calls, before distilling.

| method | rounds | 1 step | 2 steps | 4 steps | better with steps | date |
|---|---|---|---|---|---|---|
"""


def measure(method: str, rounds: int, seed: int) -> dict[str, Any]:
    """One row: sliced-W2 over the floor by number of steps, after distilling and before."""
    teacher, after, before = ring(EDM(), labelled=False), {}, {}
    for k in STEPS:
        rest = {"steps": rounds * k, "seconds": 3600, "seed": seed, "batch_size": 256}
        found = converge(method, teacher, student_steps=k, **rest)
        after[str(k)], before[str(k)] = round(found.sliced_w2 / found.floor, 2), round(found.start / found.floor, 2)
    about = {"rounds": rounds, "seed": seed, "date": str(datetime.date.today()), "on": machine()}
    return {"after": after, "before": before, **about}


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/steps.md of the rows by method."""
    lines = []
    for method, row in sorted(rows.items()):
        after = [row["after"][str(k)] for k in STEPS]
        cells = " | ".join(f"{ratio:.2f} ({row['before'][str(k)]:.2f})" for k, ratio in zip(STEPS, after, strict=True))
        better = "yes" if min(after[1:]) < after[0] else "**no**"
        lines.append(f"| {method} | {row['rounds']} | {cells} | {better} | {row['date']} |\n")
    return HEAD + "".join(lines) + "\n" + "\n\n".join(sorted({row["on"] for row in rows.values()})) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    classes = {name: get_method(name) for name in METHODS}
    able = [name for name, cls in classes.items() if cls.max_steps >= STEPS[-1] and cls.target != "guided steps"]
    able.remove("guided-distillation")
    parser.add_argument("--rounds", type=int, default=150, help="for each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", choices=able, default=able)
    args = parser.parse_args()
    for method in args.methods:
        row = measure(method, args.rounds, args.seed)
        rows = (json.loads(FILE.read_text()) if FILE.is_file() else {}) | {method: row}
        FILE.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        PAGE.write_text(page(rows), encoding="utf-8")
        print(method, json.dumps(row["after"]), flush=True)


if __name__ == "__main__":
    main()

"""Does every method find the truth? Distil exact teachers by each, record it, and write docs/truth.md.

python -m benchmarks.truth [--seconds 90] [--methods swiftbrush ...] [--cases "ring, flow" ...] [--student-steps 2 4]
                           [--drawn 2 4]

Without --cases, --student-steps and --drawn the students of the page are distilled and drawn anew, and of a method that
it does not have those of the ring and the mixture. Each result goes into src/onestroke/truth.json, over the older one
of the same method, case and number of steps, and the page is written from that file: a part of the table can be
measured again alone. --methods without a name measures nothing and writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

from onestroke.methods import METHODS, RESULTS, get_method, options, results
from onestroke.metrics import machine
from onestroke.run import recipe_layers
from onestroke.settings import resolve
from onestroke.truth import CASES, Distilled, limit, measure, student_of

PAGE = Path("docs/truth.md")
MAIN = ("ring, EDM, x0", "mixture, EDM, x0")
HEAD = """# Truth

Every method distils a teacher whose score is exact from a small network fitted to it for a fifth of the time. Then
20,000 samples of the student, in as many calls as **steps** says, are compared with as many true ones; where the row
says so, the student is one that was trained for another number of them. Of the methods that distil guidance
the true ones are the guided teacher's: those of agd and lora-enhanced in as many calls as the student's, of
guided-distillation and speedupnet in many steps of a solver. `ring` is the ring of 8 Gaussians (radius 1,
standard deviation 0.1, each its own class); `mixture` has 3 anisotropic Gaussians in 8 dimensions. `onestroke methods
--check NAME` measures one row anew. The settings (`src/onestroke/recipes/exact`) were chosen on these very cases, most
on the first alone, in one step; every row is one seed, and near a limit the next run may fall on its other side. The
table says what a method can reach, not what it does with the paper's settings.

- **sliced-W2**: the sliced 2-Wasserstein distance between them. **floor**: the same between two true samples.
  **start**: of the fitted network in as many calls, before distilling.
- **ratio**: sliced-W2 over the floor. It passes up to **limit**: 5, and 12 for eps prediction on VP, whose conversion
  to x0 at the noise end amplifies errors 15-fold; one less for the methods that learn trajectories.
- **gain**: start over sliced-W2. It passes from 5, where the limit is 5.
- **worst**: the smallest part of the samples at a mode, over that mode's true weight. It passes from 0.5.

| method | case | steps | sliced-W2 | floor | ratio | limit | start | gain | worst | rounds | seconds | pass | date |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

OPTIONS = """
## Options that were not the defaults

What `src/onestroke/recipes/exact` sets of a method's own options, with the default behind it. In bold: parts of the
loss whose weight is 0, so that the rows above say nothing of them. Run settings (rates, averages, batches) are not
listed; without one of the files' own, guidance_scale is 1.

"""


def result(student: Distilled, case: str, drawn: int | None = None) -> dict[str, Any]:
    """One row, as the file keeps it: of a student in its own number of steps, or in another one."""
    found, trained = measure(student, drawn), len(student.few.times)
    row: dict[str, Any] = {"method": student.method, "case": case}
    row |= {k: round(getattr(found, k), 5) for k in ("sliced_w2", "floor", "start", "worst_mode")}
    row |= {"student_steps": found.student_steps, "rounds": found.rounds, "seconds": round(found.seconds)}
    row |= {} if found.student_steps == trained else {"trained_for": trained}
    row |= {"seed": student.seed, "passes": found.passes(student.method, case)}
    return row | {"date": str(datetime.date.today()), "on": machine()}


def place(row: dict[str, Any]) -> tuple[str, int, int]:
    """What tells a row from the others, in their order."""
    return row["method"], list(CASES).index(row["case"]), row["student_steps"]


def line(row: dict[str, Any], machines: list[str]) -> str:
    trained = f" (trained for {row['trained_for']})" if "trained_for" in row else ""
    ratio, verdict = row["sliced_w2"] / row["floor"], "yes" if row["passes"] else "**no**"
    return (
        f"| {row['method']} | {row['case']} | {row['student_steps']}{trained} | {row['sliced_w2']:.4f} "
        f"| {row['floor']:.4f} | {ratio:.2f} | {limit(row['method'], row['case']):g} | {row['start']:.4f} "
        f"| {row['start'] / row['sliced_w2']:.2f} | {row['worst_mode']:.2f} | {row['rounds']} "
        f"| {row['seconds']} | {verdict} | {row['date']} ({machines.index(row['on']) + 1}) |"
    )


def changed(method: str) -> str:
    """The line of a method's options that are not their defaults; empty if all are."""
    cls = get_method(method)
    default = options(cls)
    _, chosen = resolve({}, default, cls.players, *recipe_layers("exact", method))
    said = [
        f"**{k} {v} ({default[k]})**" if k.endswith("weight") and not v else f"{k} {v} ({default[k]})"
        for k, v in chosen.items()
        if v != default[k]
    ]
    return f"- {method}: {', '.join(said)}\n" if said else ""


def page(rows: list[dict[str, Any]]) -> str:
    machines = sorted({row["on"] for row in rows})
    notes = "\n".join(f"({i}) {text}." for i, text in enumerate(machines, 1))
    count = f"{sum(row['passes'] for row in rows)} of {len(rows)} rows pass."
    table = "\n".join(line(row, machines) for row in rows)
    settings = OPTIONS + "".join(changed(method) for method in sorted({row["method"] for row in rows}))
    return f"{HEAD}{table}\n\n{count} Made by `make truth`.\n\n{notes}\n{settings}"


def students(methods: list[str]) -> list[tuple[str, str, int | None, list[int]]]:
    """Of the page: (method, case, steps that it was trained for, other numbers of steps that it was drawn in)."""
    found = list[tuple[str, str, int | None, list[int]]]()
    for method in methods:
        rows = [row for row in results() if row["method"] == method]
        own = [row for row in rows if "trained_for" not in row]
        for row in own:
            case, steps = row["case"], row["student_steps"]
            more = [r["student_steps"] for r in rows if r["case"] == case and r.get("trained_for") == steps]
            found.append((method, case, steps, more))
        found += [(method, case, None, []) for case in MAIN if not own]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="for each method and case, fit and all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=None)
    parser.add_argument("--student-steps", nargs="*", type=int, default=None, help="instead of the settings'")
    parser.add_argument("--drawn", nargs="*", type=int, default=None, help="draw each student in these numbers as well")
    args = parser.parse_args()
    PAGE.write_text(page(results()), encoding="utf-8")
    chosen = students(args.methods)
    if any(given is not None for given in (args.cases, args.student_steps, args.drawn)):
        of = itertools.product(args.methods, args.cases or MAIN, args.student_steps or [None])
        chosen = [(method, case, steps, args.drawn or []) for method, case, steps in of]
    good = True
    for method, case, steps, more in chosen:
        most = get_method(method).max_steps
        if steps and steps > most:
            continue
        student = student_of(method, case, args.seconds, args.seed, steps)
        for drawn in (None, *(k for k in more if k <= most)):
            row = result(student, case, drawn)
            rows = {place(r): r for r in [*results(), row]}
            kept = [rows[key] for key in sorted(rows)]
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            PAGE.write_text(page(kept), encoding="utf-8")
            print(line(row, [row["on"]]), flush=True)
            good &= row["passes"]
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

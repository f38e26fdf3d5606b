"""Does every method find the truth? Distil the 8-mode ring by each, on each path, and write docs/truth.md.

python -m benchmarks.truth [--seconds 90] [--methods swiftbrush ...] [--out docs/truth.md]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from onestroke.methods import METHODS
from onestroke.paths import EDM, VP, Flow, Prediction
from onestroke.paths import Path as NoisingPath
from onestroke.truth import Convergence, converge, ring


class Case(NamedTuple):
    """A path, what the small network predicts on it, and the largest sliced-W2 over the floor that passes."""

    name: str
    path: NoisingPath
    prediction: Prediction
    limit: float


CASES = (
    Case("EDM, x0", EDM(), "x0", 5),
    Case("VP, v", VP(), "v", 5),
    Case("flow, flow", Flow(), "flow", 5),
    Case("VP, eps", VP(), "eps", 12),
)
HEAD = """# Truth

Every method distils a teacher whose score is exact, the ring of 8 Gaussians (radius 1, standard deviation 0.1, each its
own class), from a small network fitted to it for a fifth of the time. Then 20,000 samples of the student, one call
each, are compared with as many true ones.

- **sliced-W2**: the sliced 2-Wasserstein distance between them. **floor**: the same between two true samples.
  **start**: of the fitted network's one call, before distilling.
- **ratio**: sliced-W2 over the floor. It passes up to **limit**: 5, and 12 for eps prediction on VP, whose conversion
  to x0 at the noise end amplifies errors 15-fold.
- **worst mode**: the smallest part of the samples at a mode, over that mode's true weight. It passes from 0.5.

| method | path, prediction | sliced-W2 | floor | ratio | limit | start | worst mode | rounds | seconds | passes |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def worst_mode(found: Convergence) -> float:
    return min(w / true for w, true in zip(found.mode_weights, found.true_weights, strict=True))


def passes(case: Case, found: Convergence) -> bool:
    return found.sliced_w2 <= case.limit * found.floor and worst_mode(found) >= 0.5


def row(method: str, case: Case, found: Convergence) -> str:
    ratio, verdict = found.sliced_w2 / found.floor, "yes" if passes(case, found) else "**no**"
    return (
        f"| {method} | {case.name} | {found.sliced_w2:.4f} | {found.floor:.4f} | {ratio:.2f} | {case.limit:g} "
        f"| {found.start:.4f} | {worst_mode(found):.2f} | {found.rounds} | {found.seconds:.0f} | {verdict} |"
    )


def machine() -> str:
    """Processor, threads and versions, in words."""
    cpu = platform.processor() or platform.machine()
    if shutil.which("lscpu"):
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
        cpu = next((line.split(":", 1)[1].strip() for line in lines.splitlines() if line.startswith("Model name")), cpu)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}, {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="for each method and path, fit and all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", choices=sorted(METHODS), default=sorted(METHODS))
    parser.add_argument("--out", type=Path, default=Path("docs/truth.md"))
    args = parser.parse_args()
    rows, good = [], True
    print(HEAD.rsplit("\n\n", 1)[1], end="")
    for method in args.methods:
        for case in CASES:
            found = converge(method, ring(case.path), prediction=case.prediction, seconds=args.seconds, seed=args.seed)
            rows.append(row(method, case, found))
            good &= passes(case, found)
            print(rows[-1], flush=True)
    about = f"Made by `make truth` on {datetime.date.today()}: {args.seconds:g} s each, seed {args.seed}; {machine()}."
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(HEAD + "\n".join(rows) + f"\n\n{about}\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

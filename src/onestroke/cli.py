"""The command line: thin calls of the library functions of the same names."""

from __future__ import annotations

import json
import os
import sys
import warnings
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from onestroke.errors import InputError, Notice, OnestrokeError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


@app.callback()
def root() -> None:
    """Distil any diffusion text-to-image model into one call."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the student, the sheet and the report.")] = Path("runs/demo"),
):
    """Distil the built-in teacher with SwiftBrush; write the pictures and every measured figure."""
    from onestroke.demo import demo as run

    report = run(out)
    table = Table("", "KID", "retrieval", "ms / image")
    for name, row in report.items():
        if isinstance(row, dict) and "kid" in row:
            figures = (row["kid"], row["retrieval"], 1000 * row["seconds_per_image"])
            table.add_row(name, f"{figures[0]:.4f}", f"{figures[1]:.3f}", f"{figures[2]:.1f}")
    console.print(table)
    console.print(f"real against real KID {report['kid_floor']:.4f}; {report['seconds_total']:.0f} s in all")
    print(f"pictures: {out / 'samples.png'}   figures: {out / 'report.json'}   pipeline: {out}")


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="Built-in name, pipeline folder or hub id.")],
    method: Annotated[str, typer.Option(help="See `onestroke methods`.")],
    out: Annotated[Path, typer.Option(help="Empty folder for the student and its checkpoints.")],
    prompts: Annotated[
        Path | None, typer.Option(help="UTF-8 text, one prompt per line; or a folder of such files.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Or a folder of pictures with captions, the prompts.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rounds of the method.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per round and process.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. lr.student=1e-5. Repeatable.")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="Folder of pairs or ways to read or make.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random number.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
):
    """Distil TEACHER into a student that draws in one call (or a few), from prompts alone where the method allows."""
    from onestroke.run import distill as run
    from onestroke.settings import parse

    given = {"seed": seed} | parse(set_ or [])
    given |= {k: v for k, v in {"steps": steps, "batch_size": batch_size}.items() if v is not None}
    run(teacher, method=method, prompts=prompts, images=images, out=out, pairs=pairs, resume=resume, **given)
    print(f"student: {out}")


@app.command()
def plan(
    teacher: Annotated[str, typer.Argument(help="Built-in name or pipeline folder.")],
    method: Annotated[str, typer.Option(help="See `onestroke methods`.")],
    batch_size: Annotated[int | None, typer.Option(help="Samples per round and process.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels per side; default: the teacher's own.")] = None,
    memory: Annotated[str | None, typer.Option(help="What there is, e.g. 24GiB.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: what this machine has.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, as for distill. Repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """Predict the memory of a run before anything is loaded; with --memory, say what makes it fit.

    Exit code 1: the run does not fit as it is.
    """
    from onestroke.plan import parse_bytes, switches
    from onestroke.plan import plan as run
    from onestroke.settings import parse

    given = parse(set_ or [])
    given |= {} if batch_size is None else {"batch_size": batch_size}
    given |= {} if resolution is None else {"height": resolution, "width": resolution}
    limit = None if memory is None else parse_bytes(memory)
    found = run(teacher, method, device=device, **given)
    fits = None if limit is None else found.peak <= limit
    remedy = switches(teacher, method, limit, device=device, **given) if limit is not None and not fits else None
    if as_json:
        extra = {"fits": fits, "switches": remedy and remedy[0], "peak_with_switches": remedy and remedy[1].peak}
        print(json.dumps(found.as_dict() | extra, indent=2))
    else:
        table = Table("", "GiB")
        for name, size in found.rows():
            table.add_row(name, f"{size / 2**30:.3f}")
        console.print(table)
        if limit is not None:
            how = "fits" if fits else "does not fit"
            print(f"{how} into {memory}: {found.peak / 2**30:.3f} of {limit / 2**30:.3f} GiB")
            if remedy:
                print(f"with {', '.join(remedy[0])} it fits: {remedy[1].peak / 2**30:.3f} GiB")
            elif not fits:
                print("no set of switches makes it fit; take a smaller resolution or a smaller teacher")
    if fits is False:
        raise typer.Exit(1)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A student's folder, or a teacher.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    steps: Annotated[int | None, typer.Option(help="Network calls; default: as trained, 25 for a teacher.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Picture i uses seed + i.")] = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of a teacher, default 3; or of a student that was told it in training.")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="Of a teacher, for example deis-tab3; default: its pipeline's own sampler.")
    ] = None,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="A teacher's guidance, while it matters.")] = False,
    negative: Annotated[str, typer.Option(help="What a student is to stay away from.")] = "",
    nasa_scale: Annotated[float | None, typer.Option(help="How much; default: 0.2, or as trained.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA of the teacher, a safetensors file.")] = None,
    lora_scale: Annotated[float, typer.Option(help="What it is multiplied by.")] = 1.0,
    controlnet: Annotated[str | None, typer.Option(help="A ControlNet of the teacher, folder or hub id.")] = None,
    control_image: Annotated[Path | None, typer.Option(help="The picture that it reads.")] = None,
    control_scale: Annotated[float, typer.Option(help="What it is multiplied by.")] = 1.0,
    out: Annotated[Path, typer.Option(help="PNG file; one row per prompt.")] = Path("samples.png"),
):
    """Draw pictures with a student or a teacher."""
    from onestroke.students.sample import sample as run

    run(
        model,
        prompts,
        steps=steps,
        count=count,
        seed=seed,
        guidance_scale=guidance_scale,
        solver=solver,
        adaptive=adaptive,
        negative=negative,
        nasa_scale=nasa_scale,
        lora=lora,
        lora_scale=lora_scale,
        controlnet=controlnet,
        control_image=control_image,
        control_scale=control_scale,
        out=out,
    )
    print(f"pictures: {out}")


@app.command()
def check_lora(
    student: Annotated[Path, typer.Argument(help="A student's folder.")],
    lora: Annotated[Path, typer.Argument(help="A LoRA of its teacher, a safetensors file.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher, if not where it was.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="UTF-8 text, one prompt per line; default: four.")] = None,
    scale: Annotated[float, typer.Option(help="What the LoRA is multiplied by.")] = 1.0,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures per prompt.")] = 2,
    seed: Annotated[int, typer.Option(help="Picture i uses seed + i.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report there, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """Measure how much of what a LoRA does on the teacher it does on a student."""
    from onestroke.students.lora import check_lora as run

    if out is not None and out.exists():
        raise InputError(f"{out} exists; choose another --out.")
    found = run(student, lora, teacher=teacher, prompts=prompts, scale=scale, count=count, seed=seed)
    text = json.dumps(found, indent=2)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    if as_json:
        print(text)
        return
    table = Table("", "teacher's change", "student's change", "cosine", "mean cosine", "kept")
    for name in ("pictures", "network"):
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in found[name].values()))
    console.print(table)
    console.print("change: over the picture's contrast; mean cosine: of what all pictures share;")
    console.print("kept: the part of the teacher's shared change that the student's has, 1 is all of it")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A student's folder.")],
    to: Annotated[str, typer.Option(help="diffusers, lora, onnx or sprint.")],
    out: Annotated[Path, typer.Option(help="Empty folder for it, its model card and parity.json.")],
    dtype: Annotated[str | None, typer.Option(help="Of diffusers: float32, float16 or bfloat16.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of lora: extract this rank; default 64, or as trained.")] = None,
    base: Annotated[str | None, typer.Option(help="Of lora: the teacher, if not where it was.")] = None,
):
    """Write a student as a pipeline, as LoRA weights for its teacher or as ONNX, and compare what that draws."""
    from onestroke.students.exports import export as run

    run(model, to=to, out=out, dtype=dtype, rank=rank, base=base)
    print(f"{to}: {out}")


@app.command()
def merge(
    students: Annotated[list[Path], typer.Argument(help="Two or more students' folders.")],
    out: Annotated[Path, typer.Option(help="Empty folder for the student.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each student, in their order; default: equal. Repeatable.")
    ] = None,
):
    """Write the weighted mean of the weights of students of one teacher as a student."""
    from onestroke.students.merging import merge as run

    run(students, weight, out=out)
    print(f"student: {out}")


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    check: Annotated[str | None, typer.Option(help="A method: distil an exact teacher by it and measure.")] = None,
    seconds: Annotated[float, typer.Option(help="Of the check.")] = 60,
    case: Annotated[str, typer.Option(help="The exact teacher of the check.")] = "ring, EDM, x0",
):
    """List the methods: what each needs, plays and costs, and how near to the truth it came; or check one now."""
    from onestroke.methods import METHODS, describe, extra_memory

    if check:
        from onestroke.truth import check as run

        found = run(check, case, seconds)
        if as_json:
            print(json.dumps(found.as_dict(), indent=2))
            return
        verdict = "passes" if found.passes(check, case) else "does not pass"
        print(
            f"{check} on {case}: sliced-W2 {found.sliced_w2:.4f}, {found.sliced_w2 / found.floor:.2f} x the floor of "
            f"two true samples ({found.start / found.floor:.1f} x before); worst mode at {found.worst_mode:.2f} of its "
            f"weight; {found.rounds} rounds in {found.seconds:.0f} s: {verdict}"
        )
        return
    rows = [describe(name) for name in METHODS]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for family, group in groupby(rows, lambda row: row["family"]):
        console.print(f"\n[bold]{family}[/]")
        for row in group:
            steps = "one step" if row["max_steps"] == 1 else f"1 to {row['max_steps']} steps"
            passes = ", ".join(f"{k} {v}" for k, v in row["passes"].items())
            checked = "; ".join(f"{case}: {ratio:.1f} x" for case, ratio in row["checked"].items()) or "not checked"
            facts = (
                f"needs {', '.join(row['needs'])}; {steps}; plays {', '.join(row['players'])}; "
                f"extra memory: {extra_memory(row)}; {row['cost']} passes ({passes})\n{checked}"
            )
            console.print(f"  [bold cyan]{row['name']}[/]  {row['paper']}", highlight=False)
            console.print(Padding(facts, (0, 0, 0, 4)), highlight=False)
    console.print(
        "\nextra memory: networks beside teacher and student, trained or copied from the student, adapters alone"
    )
    console.print("with LoRA; passes: of one round, by network;")
    console.print("last line: the sliced-W2 on exact teachers over that of two true samples (docs/truth.md)")


@app.command()
def teachers(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False):
    """List the built-in teachers. Any text-to-image pipeline of diffusers, a folder or hub id, may be one."""
    from onestroke.teachers import built_in

    rows = list(built_in().values())
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("teacher", "what it draws", "pixels", "parameters", "licence")
    for row in rows:
        table.add_row(
            row["name"], row["summary"], str(row["resolution"]), f"{row['parameters'] / 1e6:.1f} M", row["licence"]
        )
    console.print(table)


def quiet() -> None:
    """Keep the libraries' own notices and bars out of the command line's output."""
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", category=Notice)
    for name in ("diffusers", "transformers", "huggingface_hub"):
        os.environ.setdefault(f"{name.upper()}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    quiet()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except (OnestrokeError, UsageError) as error:
        message = error.format_message() if isinstance(error, UsageError) else str(error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)

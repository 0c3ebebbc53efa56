"""The main job: a real model, real pictures and questions, before and after ``patch``, in figures of this very run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import velm_kernels
from python_models.demo import attention_map, data, families, plots, training
from velm_kernels import measure
from velm_kernels.backends import cpu

# How far the losses of the two may be apart, relatively. Rounding differs by about 1e-7 a step and grows with the
# number of steps, as it would between two versions of torch.
LOSS_TOLERANCE = {"short": 1e-3, "full": 2e-2}
OUTPUT_TOLERANCE = 1e-4
# After fewer steps than these the model knows less than the commonest answer: neither its accuracy nor where it looks
# means anything, and neither is shown.
ENOUGH_STEPS = 240
SHOWN = ("what shape is in the image?", "what color is the shape?", "is there a circle?")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m python_models.demo", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute instead of minutes, and assertions: for CI")
    parser.add_argument("--together", type=int, help="training steps of both models")
    parser.add_argument("--steps", type=int, help="training steps of the patched model, which goes on alone")
    parser.add_argument("--batch", type=int, help="questions a step (default 16, short 8)")
    parser.add_argument("--rounds", type=int, help="timed runs of each whole model")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args(arguments)
    defaults = {"together": 6, "steps": 6, "batch": 8, "rounds": 1}
    if not args.short:
        defaults = {"together": 20, "steps": ENOUGH_STEPS, "batch": 16, "rounds": 2}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.together = min(args.together, args.steps)
    return args


def machine(threads: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "threads": threads}
    facts["instruction set"] = cpu.in_use() or "none: the CPU libraries are not built"
    return facts


def train(console: Console, args: argparse.Namespace, splits: tuple[data.Split, data.Split], tokenizer: data.Tokenizer):
    model = training.build(len(tokenizer), tokenizer.length)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        bars = {
            "unpatched": progress.add_task("unpatched", total=args.together, state=""),
            "patched": progress.add_task("patched  ", total=args.steps, state=""),
        }

        def show(plain: training.Trained, fast: training.Trained) -> None:
            for name, trained in (("unpatched", plain), ("patched", fast)):
                state = f"loss {statistics.fmean(trained.losses[-10:]):.3f}, {trained.seconds[-1] * 1e3:.0f} ms a step"
                progress.update(bars[name], completed=len(trained.losses), state=state)

        return training.side_by_side(
            model,
            velm_kernels.patch,
            splits[0],
            together=args.together,
            steps=args.steps,
            batch_size=args.batch,
            progress=show,
        )


def step_times(plain: training.Trained, fast: training.Trained, together: int) -> dict[str, float]:
    """Medians over the steps both took, without the first two."""
    skip = min(2, together - 1)
    before, after = (statistics.median(trained.seconds[skip:together]) for trained in (plain, fast))
    return {"unpatched_ms": before * 1e3, "patched_ms": after * 1e3, "speedup": before / after}


def evaluate(console: Console, fast: training.Trained, splits: tuple[data.Split, data.Split]) -> dict[str, Any]:
    rows = torch.randperm(len(splits[1]), generator=torch.Generator().manual_seed(0))
    rows = rows[:1000]
    reached = training.accuracy(fast.model, splits[1], rows)
    references = data.baselines(*splits)
    table = Table(title=f"accuracy on {len(rows)} held-out questions about pictures never trained on")
    table.add_column("answers from")
    table.add_column("right", justify="right")
    for name, value in references.items():
        table.add_row(name, f"{value:.1%}")
    for name, value in reached.items():
        table.add_row(f"trained model, {name}", f"{value:.1%}")
    console.print(table)
    return {"held_out_questions": len(rows), "reached": reached, "baselines": references}


def same_outputs(plain: training.Trained, splits: tuple[data.Split, data.Split]) -> float:
    """The relative difference that ``patch`` makes to the unpatched, trained model's logits."""
    inputs = data.batch(splits[1], torch.arange(16))
    found = []
    with torch.inference_mode():
        for change in (None, velm_kernels.patch, velm_kernels.unpatch):
            if change is not None:
                change(plain.model)
            torch.manual_seed(0)
            found.append(plain.model.eval()(**inputs).logits)
    if not torch.equal(found[0], found[2]):
        raise AssertionError("unpatch did not bring back the original outputs")
    return measure.relative_rms([found[1]], [found[0]])


def compare_families(console: Console, args: argparse.Namespace) -> list[families.Comparison]:
    names = list(families.FAMILIES)[: 4 if args.short else None]
    found = []
    with Progress(console=console) as progress:
        bar = progress.add_task("whole models", total=len(names))
        for name in names:
            progress.update(bar, description=f"whole models: {name}")
            found.append(families.compare(name, families.FAMILIES[name], 1 if args.short else None, args.rounds))
            progress.advance(bar)
    table = Table(title="whole models, fp32, before -> after patch (medians of alternating runs)")
    for name in ("model", "size"):
        table.add_column(name)
    for name in ("inference ms", "", "forward+backward ms", "", "kept for backward MiB", "peak MiB"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            one.family,
            one.size,
            "{:.0f} -> {:.0f}".format(*one.inference_ms),
            f"{one.inference_speedup:.2f}x",
            "{:.0f} -> {:.0f}".format(*one.step_ms),
            f"{one.step_speedup:.2f}x",
            "{:.0f} -> {:.0f}".format(*(count / 2**20 for count in one.saved_bytes)),
            "{:.0f} -> {:.0f}".format(*(count / 2**20 for count in one.peak_bytes)),
        )
    console.print(table)
    return found


def look(model: torch.nn.Module, split: data.Split) -> list[plots.Looked]:
    """Held-out pictures with one question of each kind, and where the model looked."""
    names, found = data.answers(), []
    used: set[int] = set()
    for wanted in SHOWN:
        number = next(n for n, q in enumerate(split.questions) if q == wanted and int(split.picture[n]) not in used)
        used.add(int(split.picture[number]))
        predicted = names[int(training.predict(model, split, torch.tensor([number]))[0])]
        found.append(
            plots.Looked(
                split.pictures[split.picture[number]],
                wanted,
                predicted,
                names[int(split.answer[number])],
                attention_map.regions(model, split, number),
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    begin = time.perf_counter()
    torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 120)
    tokenizer: data.Tokenizer
    with console.status("reading pictures and questions"):
        train_split, held_out, tokenizer = data.load()
    splits = (train_split, held_out)
    console.print(
        f"easy-vqa: {len(train_split)} questions about {len(train_split.pictures)} pictures to train on, "
        f"{len(held_out)} about {len(held_out.pictures)} others held out; {len(tokenizer)} words; "
        f"torch {torch.__version__}, {args.threads} threads, {machine(args.threads)['instruction set']}"
    )
    image_tokens = (data.IMAGE_SIZE // training.PATCH) ** 2
    console.print(
        f"ViLT: width {training.WIDTH}, {training.HEADS} heads, {training.LAYERS} layers, {tokenizer.length} text and "
        f"{image_tokens} + 1 image tokens, random weights, batch {args.batch}, fp32. The unpatched and the patched "
        f"one train in turns for {args.together} steps; the patched one goes on alone to {args.steps}."
    )
    plain, fast, report = train(console, args, splits, tokenizer)
    times = step_times(plain, fast, args.together)
    apart = max(abs(a - b) / abs(a) for a, b in zip(plain.losses, fast.losses[: args.together], strict=True))
    console.print(
        f"training step: unpatched {times['unpatched_ms']:.0f} ms, patched {times['patched_ms']:.0f} ms: "
        f"{times['speedup']:.2f}x. Largest relative difference of the losses over {args.together} steps: {apart:.1e}"
    )
    console.print(str(report), markup=False, highlight=False)
    changed = same_outputs(plain, splits)
    console.print(
        f"patch changes the outputs of the unpatched model by {changed:.1e} (relative RMS); unpatch restores them"
    )
    accuracy = None
    if args.steps >= ENOUGH_STEPS:
        accuracy = evaluate(console, fast, splits)
    else:
        console.print(f"{args.steps} steps teach it nothing yet: accuracy is measured after {ENOUGH_STEPS} or more")
    compared = compare_families(console, args)

    plots.curves_and_speed(args.out / "training.png", plain.losses, fast.losses, times["speedup"], compared)
    written = ["training.png", "results.json"]
    if accuracy is not None:
        plots.attention_on_pictures(args.out / "attention.png", look(fast.model, held_out))
        written.append("attention.png")
    results = {
        "machine": machine(args.threads),
        "short": args.short,
        "batch": args.batch,
        "steps": {"together": args.together, "patched": args.steps},
        "training_step": times,
        "largest_relative_loss_difference": apart,
        "relative_output_difference": changed,
        "losses": {"unpatched": plain.losses, "patched": fast.losses},
        "accuracy": accuracy,
        "replaced": [dataclasses.asdict(entry) for entry in report.entries],
        "families": [dataclasses.asdict(one) for one in compared],
        "seconds": time.perf_counter() - begin,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in written:
        console.print(f"wrote {args.out / name}")
    console.print(f"{results['seconds']:.0f} seconds")

    tolerance = LOSS_TOLERANCE["short" if args.short else "full"]
    wrong = []
    if not apart <= tolerance:
        wrong.append(f"the losses differ by {apart:.1e}, more than {tolerance:.0e}")
    if not changed <= OUTPUT_TOLERANCE:
        wrong.append(f"patch changes the outputs by {changed:.1e}, more than {OUTPUT_TOLERANCE:.0e}")
    wrong += [
        f"patch changes the outputs of {one.family} by {one.error:.1e}"
        for one in compared
        if not one.error <= OUTPUT_TOLERANCE
    ]
    if not report.replaced:
        wrong.append("patch replaced nothing")
    for line in wrong:
        console.print(f"WRONG: {line}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

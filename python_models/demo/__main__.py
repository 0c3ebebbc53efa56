"""What the kernels do to real models on real pictures and questions, in figures and one picture of this very run."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import velm_kernels
from python_models.demo import families, inputs, plots, training
from python_models.vqa import commands, data, evaluation, results
from python_models.vqa.config import Config
from python_models.vqa.training import BEST, Trainer
from velm_kernels import measure
from velm_kernels.backends import cpu

# How far the losses of two ways to train may be apart, relatively. Rounding differs by about 1e-7 a step and grows with
# the number of steps, as it would between two versions of torch.
LOSS_TOLERANCE = 1e-3
OUTPUT_TOLERANCE = 1e-4
# Share of the held-out questions that the trained model has to answer rightly, and of the validation questions, about
# yet other pictures, at which training ends.
GOAL, ENOUGH = 0.95, 0.98
# Bilinear attention over regions says where the model looked; MLB joins what it saw with the question.
CONFIG = Config(fusion="mlb", pooling="bilinear-attention", epochs=6)
# The kinds of question that are shown, with the answers that are right.
SHOWN = ("shape", "color", "yes", "shape", "color", "no")
# Of the pictures, in the short form.
EVERY = 25


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m python_models.demo", description=__doc__)
    parser.add_argument(
        "--short",
        action="store_true",
        help="whether numbers agree, without times and accuracy, which take longer: for CI",
    )
    parser.add_argument("--steps", type=int, help="training steps of each of two models in turns (default 12, short 3)")
    parser.add_argument("--batch", type=int, help="questions a step of ViLT (default 16, short 8)")
    parser.add_argument("--epochs", type=int, default=CONFIG.epochs, help="at most so many passes over the questions")
    parser.add_argument("--rounds", type=int, help="timed runs of each whole model (default 3, short none)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="after which no other whole model is begun (default 60)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    args = parser.parse_args(arguments)
    defaults = {"steps": 3, "batch": 8, "rounds": 0} if args.short else {"steps": 12, "batch": 16, "rounds": 3}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def machine(threads: int) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "instruction set": cpu.in_use() or "none: the CPU libraries are not built",
    }


def train_in_turns(console: Console, args: argparse.Namespace, dataset: data.Dataset) -> training.InTurns:
    """ViLT, unpatched and patched."""
    tokenizer = inputs.Tokenizer(dataset.texts)
    model = training.build(tokenizer, len(dataset.answers))
    with commands.bars(console) as progress:
        bar = progress.add_task("ViLT, unpatched and patched in turns", total=args.steps, state="")

        def report(plain: training.Trained, patched: training.Trained) -> None:
            state = f"losses {plain.losses[-1]:.6f} and {patched.losses[-1]:.6f}"
            progress.update(bar, completed=len(plain.losses), state=state)

        return training.in_turns(
            model, velm_kernels.patch, dataset, tokenizer, steps=args.steps, batch_size=args.batch, progress=report
        )


def change_of_outputs(model: torch.nn.Module, dataset: data.Dataset) -> float:
    """The relative difference that ``patch`` makes to the logits of an unpatched model.

    Raises:
        AssertionError: ``unpatch`` does not bring the original outputs back.
    """
    part = dataset.parts["test"]
    given = inputs.batch(dataset, part, torch.arange(min(16, len(part))), inputs.Tokenizer(dataset.texts))
    found = []
    with torch.inference_mode():
        for change in (None, velm_kernels.patch, velm_kernels.unpatch):
            if change is not None:
                change(model)
            torch.manual_seed(0)
            found.append(model.eval()(**given).logits)
    if not torch.equal(found[0], found[2]):
        raise AssertionError("unpatch did not bring back the original outputs")
    return measure.relative_rms([found[1]], [found[0]])


def train(console: Console, config: Config, dataset: data.Dataset, folder: Path) -> Trainer:
    """Train until the validation questions are answered well enough, and return to the best weights."""
    trainer = Trainer(config, dataset, folder)
    with commands.bars(console) as progress:
        bar = progress.add_task("", total=None, state="")
        while not trainer.progress.is_finished(config) and max(trainer.progress.accuracies, default=0.0) < ENOUGH:
            epoch = f"visual question answering, epoch {trainer.progress.epochs + 1}"
            trainer.epoch(
                lambda step, epoch=epoch: progress.update(
                    bar, description=epoch, completed=step.number, total=step.steps, state=f"loss {step.loss:.3f}"
                )
            )
            progress.console.print(
                f"epoch {trainer.progress.epochs}: loss {trainer.progress.losses[-1]:.3f}, "
                f"{trainer.progress.accuracies[-1]:.1%} of the validation questions"
            )
    trainer.model.load_state_dict(torch.load(folder / BEST, weights_only=True))
    return trainer


def show_accuracy(console: Console, found: evaluation.Accuracy, baselines: dict[str, float], asked: int) -> None:
    table = Table(title=f"right answers to {asked} held-out questions about pictures never trained on")
    table.add_column("answers from")
    table.add_column("right", justify="right")
    for name, share in baselines.items():
        table.add_row(name, f"{share:.1%}")
    for name, share in {"all": found.overall, **found.by_kind}.items():
        table.add_row(f"trained model, {name}", f"{share:.1%}")
    console.print(table)


def look(model: torch.nn.Module, dataset: data.Dataset, seed: int = 0) -> list[plots.Asked]:
    """Held-out questions of different kinds about different pictures, drawn whatever the model answers."""
    part, shown = dataset.parts["test"], []
    pictures: set[int] = set()
    answers: set[str] = set()
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)).tolist()
    for wanted in SHOWN:
        for row in order:
            right, picture = dataset.answers[int(part.answer[row])], int(part.picture[row])
            if wanted in (right, data.kind(right)) and right not in answers and picture not in pictures:
                break
        else:
            continue
        pictures.add(picture)
        answers.add(right)
        found = evaluation.answered(model, dataset, "test", row)
        shown.append(plots.Asked(dataset.paths[picture], dataset.texts[int(part.question[row])], found, right))
    return shown


def compare_families(console: Console, args: argparse.Namespace) -> list[families.Comparison]:
    found = []
    total = len(families.FAMILIES) * len(families.DTYPES)
    with commands.bars(console) as progress:
        bar = progress.add_task("whole models", total=total, state="")
        for one in families.comparisons(1 if args.short else None, args.rounds, args.seconds):
            found.append(one)
            progress.update(bar, completed=len(found), state=f"{one.family}, {one.dtype}")
    table = Table(title="whole models of transformers, random weights, before -> after patch")
    for name in ("model", "dtype", "batch", "size"):
        table.add_column(name)
    times = ("inference ms", "", "forward+backward ms", "") if args.rounds else ()
    for name in (*times, "kept for backward MiB", "peak of a step MiB", "error"):
        table.add_column(name, justify="right")
    for one in found:
        cells = []
        for pair in (one.inference_ms, one.step_ms):
            if pair is not None:
                cells += ["{:.0f} -> {:.0f}".format(*pair), f"{pair[0] / pair[1]:.2f}x"]
        for pair in (one.saved_bytes, one.peak_bytes):
            cells.append("{:.0f} -> {:.0f}".format(*(count / 2**20 for count in pair)))
        table.add_row(one.family, one.dtype, str(one.batch), one.size, *cells, "{:.0e} -> {:.0e}".format(*one.errors))
    console.print(table)
    if len(found) < total:
        console.print(f"{total - len(found)} of {total} were not begun after {args.seconds:.0f} seconds (--seconds)")
    return found


def faults(
    vilt: training.InTurns,
    changed: float,
    forms: results.Comparison,
    compared: Sequence[families.Comparison],
    reached: evaluation.Accuracy | None,
) -> list[str]:
    """What this run has shown to be wrong."""
    wrong = []
    for name, apart in (("ViLT", vilt.loss_difference), ("visual question answering", forms.loss_difference)):
        if not apart <= LOSS_TOLERANCE:
            wrong.append(f"the losses of {name} differ by {apart:.1e}, more than {LOSS_TOLERANCE:.0e}")
    if not changed <= OUTPUT_TOLERANCE:
        wrong.append(f"patch changes the outputs of ViLT by {changed:.1e}, more than {OUTPUT_TOLERANCE:.0e}")
    if not vilt.report.replaced or not all(one.replaced for one in compared):
        wrong.append("patch replaced nothing in a model")
    for one in compared:
        if not one.is_right:
            before, after = one.errors
            wrong.append(f"{one.family} in {one.dtype} is off by {after:.1e} after patch, by {before:.1e} before")
    if reached is not None and not reached.overall >= GOAL:
        wrong.append(f"{reached.overall:.1%} of the held-out questions are answered rightly, fewer than {GOAL:.0%}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    begin = time.perf_counter()
    torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 140)
    here = machine(args.threads)
    console.print(", ".join(f"{name} {value}" for name, value in here.items()), highlight=False)
    cache = args.out / "features.pt" if args.short else commands.FEATURES
    dataset = commands.load(console, cache, EVERY if args.short else 1)
    parts = dataset.parts
    console.print(
        f"easy-vqa: {len(parts['train'])} questions to train on, {len(parts['validation'])} to validate, "
        f"{len(parts['test'])} held out; no two parts share a picture"
    )

    image_tokens = (inputs.IMAGE_SIZE // training.PATCH) ** 2
    console.print(
        f"[bold]1. patch(model)[/]: ViLT of transformers, width {training.WIDTH}, {training.HEADS} heads, "
        f"{training.LAYERS} layers, {image_tokens} + 1 image tokens, random weights, batch {args.batch}, fp32, trained "
        f"for {args.steps} steps unpatched and patched"
    )
    vilt = train_in_turns(console, args, dataset)
    vilt_ms = (vilt.plain.median_seconds * 1e3, vilt.patched.median_seconds * 1e3)
    changed = change_of_outputs(vilt.plain.model, dataset)
    console.print(str(vilt.report), markup=False, highlight=False)
    console.print(
        f"losses differ by at most {vilt.loss_difference:.1e}, relatively; patch changes the logits by {changed:.1e} "
        "(relative RMS) and unpatch brings the original bits back"
    )
    if not args.short:
        console.print(
            "a step: unpatched {:.0f} ms, patched {:.0f} ms, {:.2f}x".format(*vilt_ms, vilt_ms[0] / vilt_ms[1])
        )

    config = dataclasses.replace(CONFIG, epochs=args.epochs)
    console.print(
        f"[bold]2. A model built from the operators[/]: visual question answering, {config.pooling} pooling, "
        f"{config.fusion} fusion (python_models/vqa), trained for {args.steps} steps beside the same modules in plain "
        "PyTorch"
    )
    forms = results.Comparison.of(config, dataset, args.steps)
    forms_ms = (forms.seconds[1] * 1e3, forms.seconds[0] * 1e3)
    forms_peak = (forms.peak_bytes[1], forms.peak_bytes[0])
    console.print(
        f"losses differ by at most {forms.loss_difference:.1e}, relatively; peak of a step: plain "
        "{:.0f} MiB, these kernels {:.0f} MiB".format(*(count / 2**20 for count in forms_peak))
    )
    reached, asked = None, []
    baselines = data.baselines(dataset)
    if not args.short:
        console.print(
            "a step: plain {:.0f} ms, these kernels {:.0f} ms, {:.2f}x".format(*forms_ms, forms_ms[0] / forms_ms[1])
        )
        trainer = train(console, config, dataset, args.out / "vqa")
        reached = evaluation.accuracy(trainer.model, dataset)
        console.print(f"{trainer.progress.seconds:.0f} seconds of training")
        show_accuracy(console, reached, baselines, len(parts["test"]))
        asked = look(trainer.model, dataset)
        for one in asked:
            answer, probability = one.found.answers[0]
            console.print(f"{one.question} {answer} ({probability:.0%}); right: {one.right}", highlight=False)

    console.print("[bold]3. Whole models at realistic sizes[/]")
    compared = compare_families(console, args)

    args.out.mkdir(parents=True, exist_ok=True)
    written = {
        "machine": here,
        "short": args.short,
        "patch": {
            "losses": {"unpatched": vilt.plain.losses, "patched": vilt.patched.losses},
            "largest_relative_loss_difference": vilt.loss_difference,
            "relative_output_difference": changed,
            "replaced": [dataclasses.asdict(entry) for entry in vilt.report.entries],
        },
        "question_answering": {
            "config": dataclasses.asdict(config),
            "largest_relative_loss_difference": forms.loss_difference,
            "peak_bytes": forms_peak,
        },
        "families": [dataclasses.asdict(one) for one in compared],
    }
    names = ["results.json"]
    if reached is not None:
        written["patch"]["step_ms"] = vilt_ms
        written["question_answering"] |= {"step_ms": forms_ms, "held_out": dataclasses.asdict(reached)}
        written["question_answering"] |= {"baselines": baselines, "training_seconds": trainer.progress.seconds}
        shown = plots.Shown(
            f"{here['date']}, torch {here['torch']}, {here['instruction set']}, {args.threads} threads",
            (vilt.plain.losses, vilt.patched.losses),
            vilt.loss_difference,
            (
                plots.Turns(f"ViLT, {image_tokens} image tokens,\nbatch {args.batch}:\npatch(model)", vilt_ms),
                plots.Turns(
                    f"question answering by\n{config.pooling.replace('-', ' ')}, batch {config.batch}:\n"
                    "plain PyTorch, velm_kernels\n(peak {:.0f} and {:.0f} MiB)".format(
                        *(c / 2**20 for c in forms_peak)
                    ),
                    forms_ms,
                ),
            ),
            {**baselines, "all": reached.overall, **reached.by_kind},
            ("all", *reached.by_kind),
            asked,
            compared,
        )
        plots.overview(args.out / "demo.png", shown)
        names.append("demo.png")
    written["seconds"] = time.perf_counter() - begin
    (args.out / "results.json").write_text(json.dumps(written, indent=1) + "\n")
    for name in names:
        console.print(f"wrote {args.out / name}")
    if args.short:
        console.print("Times, accuracy and the picture need the whole demo: make demo")
    console.print(f"{written['seconds']:.0f} seconds")
    wrong = faults(vilt, changed, forms, compared, reached)
    for line in wrong:
        console.print(f"WRONG: {line}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m python_models vqa train | evaluate | predict | results."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from python_models.vqa import data, evaluation, plots, results, training
from python_models.vqa.config import Config
from python_models.vqa.fusions import FUSIONS, Forms
from python_models.vqa.model import VisualQuestionAnswering
from python_models.vqa.poolings import POOLINGS

FEATURES = Path("out/vqa/features.pt")
CHOICES = {"fusion": sorted(FUSIONS), "pooling": sorted(POOLINGS), "form": list(Forms._fields)}


def bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[state]}"), console=console)


def load(console: Console, cache: Path, every: int = 1) -> data.Dataset:
    with bars(console) as progress:
        task = progress.add_task("encoding pictures", total=None, state="", visible=not cache.exists())
        return data.load(cache, lambda done, total: progress.update(task, completed=done, total=total), every=every)


def load_model(folder: Path, answers: int) -> tuple[Config, torch.nn.Module]:
    if not (folder / training.BEST).exists():
        raise FileNotFoundError(f"{folder} holds no trained model; python -m python_models vqa train makes one")
    config = Config.load(folder / training.CONFIG)
    model = VisualQuestionAnswering(config, answers)
    model.load_state_dict(torch.load(folder / training.BEST, weights_only=True))
    return config, model


def train(args: argparse.Namespace) -> int:
    console = Console()
    config = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    folder = args.folder or Path("out/vqa") / f"{config.fusion}-{config.pooling}".replace(" ", "-")
    if (folder / training.CHECKPOINT).exists() and not args.resume:
        console.print(f"{folder} holds a run already: --resume goes on with it, --run writes elsewhere")
        return 2
    dataset = load(console, args.features)
    trainer = training.Trainer(config, dataset, folder)
    trainer.resume()
    with bars(console) as progress:
        task = progress.add_task("training", total=None, state="")
        while not trainer.progress.is_finished(config):
            number = trainer.progress.epochs + 1

            def report(step: training.Step, number: int = number) -> None:
                state = f"loss {step.loss:.3f}"
                progress.update(
                    task, description=f"epoch {number}", completed=step.number, total=step.steps, state=state
                )

            trainer.epoch(report)
            loss, right = trainer.progress.losses[-1], trainer.progress.accuracies[-1]
            progress.console.print(f"epoch {number}: loss {loss:.4f}, {right:.2%} of the validation questions")
    best = trainer.progress.best
    console.print(
        f"best after epoch {best + 1}: {trainer.progress.accuracies[best]:.2%} of the validation questions; "
        f"{trainer.progress.seconds:.0f} seconds of training; kept in {folder}"
    )
    return 0


def compare(args: argparse.Namespace) -> int:
    console = Console()
    dataset = load(console, args.features)
    configs = [replace(config, epochs=args.epochs) for config in results.models()]
    rows = []
    with bars(console) as progress:
        task = progress.add_task("models", total=len(configs), state="")
        for config in configs:
            progress.update(task, description=f"{config.fusion}, {config.pooling} pooling")
            rows.append(results.run(config, dataset, args.folder, lambda state: progress.update(task, state=state)))
            progress.advance(task)
    results.write(args.folder, rows, data.baselines(dataset))
    console.print((args.folder / results.TABLE).read_text())
    return 0


def evaluate(args: argparse.Namespace) -> int:
    console = Console()
    dataset = load(console, args.features)
    config, model = load_model(args.folder, len(dataset.answers))
    found = evaluation.accuracy(model, dataset, args.part)
    table = Table(title=f"{config.fusion}, {config.pooling} pooling: right answers to {args.part} questions")
    table.add_column("questions")
    table.add_column("right", justify="right")
    table.add_row("all", f"{found.overall:.2%}")
    for name, share in found.by_kind.items():
        table.add_row(name, f"{share:.2%}")
    for name, share in data.baselines(dataset, args.part).items():
        table.add_row(f"all, by the {name}" if name == "commonest answer" else f"all, {name}", f"{share:.2%}")
    console.print(table)
    return 0


def predict(args: argparse.Namespace) -> int:
    console = Console()
    answers = data.answers()
    _, model = load_model(args.folder, len(answers))
    picture = Image.open(args.picture)
    found = evaluation.predict(model, answers, picture, args.question)
    for answer, probability in found.answers:
        console.print(f"{answer:12} {probability:.1%}")
    if args.map:
        plots.attention(args.map, picture, args.question, found)
        console.print(f"what it looked at: {args.map}")
    return 0


def add_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run_command=run, run=_run)
        added.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
        return added

    one = command("train", train, "train one model; the checkpoint after every epoch can be resumed")
    for field in fields(Config):
        options = {"choices": CHOICES[field.name]} if field.name in CHOICES else {"type": type(field.default)}
        name = "--" + field.name.replace("_", "-")
        one.add_argument(name, default=field.default, help=f"default {field.default}", **options)
    one.add_argument("--folder", type=Path, help="where the run is kept (default out/vqa/FUSION-POOLING)")
    one.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    one.add_argument("--features", type=Path, default=FEATURES, help=f"cached features (default {FEATURES})")

    two = command("evaluate", evaluate, "right answers of a trained model, by kind of question, beside baselines")
    two.add_argument("folder", type=Path, help="where train has kept the run")
    two.add_argument("--part", choices=("validation", "test"), default="test")
    two.add_argument("--features", type=Path, default=FEATURES, help=f"cached features (default {FEATURES})")

    three = command("predict", predict, "answer one question about one picture")
    three.add_argument("folder", type=Path, help="where train has kept the run")
    three.add_argument("picture", type=Path)
    three.add_argument("question")
    three.add_argument("--map", type=Path, help="a PNG to draw the regions that counted into")

    four = command("results", compare, "train with every module, and compare each with its form in plain PyTorch")
    four.add_argument("--folder", type=Path, default=Path("out/vqa/results"), help="where runs and the table go")
    four.add_argument("--epochs", type=int, default=4, help="of each model (default 4)")
    four.add_argument("--features", type=Path, default=FEATURES, help=f"cached features (default {FEATURES})")


def _run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    try:
        return args.run_command(args)
    except (ValueError, OSError) as error:
        print(f"python -m python_models vqa: {error}", file=sys.stderr)
        return 2

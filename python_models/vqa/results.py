"""Every fusion and every pooling, trained with these kernels and beside its form in plain PyTorch: one table."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from python_models.vqa import evaluation
from python_models.vqa.config import Config
from python_models.vqa.data import Dataset
from python_models.vqa.fusions import FUSIONS, Forms
from python_models.vqa.poolings import POOLINGS
from python_models.vqa.training import BEST, Trainer
from velm_kernels import measure

SUMMARY, TABLE, CSV = "summary.json", "results.md", "results.csv"
# Steps that both forms take in turns, the first of which are not timed.
COMPARED, WARM_UP = 40, 4


@dataclass(frozen=True)
class Comparison:
    """The two forms of a model, from the same weights on the same questions in turns.

    Attributes:
        seconds: the median of a step, of this library's form and of the plain one.
        peak_bytes: that a step allocates at once, of either.
        loss_difference: the largest relative difference of the losses of a step.
    """

    seconds: tuple[float, float]
    peak_bytes: tuple[int, int]
    loss_difference: float

    @classmethod
    def of(cls, config: Config, dataset: Dataset, steps: int = COMPARED) -> Comparison:
        trainers = [Trainer(replace(config, form=form), dataset) for form in Forms._fields]
        taken = list(islice(zip(*(trainer.steps() for trainer in trainers), strict=True), steps))
        ours, plain = zip(*taken, strict=True)
        timed = slice(min(WARM_UP, steps - 1), None)
        return cls(
            tuple(statistics.median(step.seconds for step in form[timed]) for form in (ours, plain)),
            tuple(_peak(trainer) for trainer in trainers),
            loss_difference([step.loss for step in plain], [step.loss for step in ours]),
        )


def loss_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest relative difference of the losses of a step; NaN if one of them is."""
    expected, found = torch.tensor(losses, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)
    return float(((found - expected).abs() / expected.abs()).max())


def _peak(trainer: Trainer) -> int:
    part = trainer.dataset.parts["train"]
    rows = torch.arange(min(trainer.config.batch, len(part)))
    return measure.peak_memory(lambda: trainer.loss(part, rows).backward())


@dataclass(frozen=True)
class Row:
    """What a configuration came to.

    Attributes:
        fusion, pooling: the modules.
        accuracy: share of right answers to the test questions.
        parameters: trained ones.
        seconds: of training, all epochs.
        comparison: with the plain form.
    """

    fusion: str
    pooling: str
    accuracy: float
    parameters: int
    seconds: float
    comparison: Comparison


def models() -> list[Config]:
    """Every fusion under question-guided attention, then every other pooling under the default fusion."""
    fusions = [Config(fusion=name) for name in FUSIONS]
    return fusions + [Config(pooling=name) for name in POOLINGS if name != Config.pooling]


def run(config: Config, dataset: Dataset, folder: Path, report: Callable[[str], None] = lambda state: None) -> Row:
    """Train for all epochs and compare the forms; what an earlier call has done in the folder is not done again."""
    folder = folder / f"{config.fusion}-{config.pooling}"
    if (folder / SUMMARY).exists():
        kept = json.loads((folder / SUMMARY).read_text())
        if kept.pop("config") == asdict(config):
            return Row(**kept | {"comparison": Comparison(**kept["comparison"])})
    report("in turns with plain PyTorch")
    comparison = Comparison.of(config, dataset)
    trainer = Trainer(config, dataset, folder)
    trainer.resume()
    while trainer.progress.epochs < config.epochs:
        trainer.epoch(lambda step: report(f"epoch {trainer.progress.epochs + 1}, {step.number} of {step.steps}"))
    trainer.model.load_state_dict(torch.load(folder / BEST, weights_only=True))
    accuracy = evaluation.accuracy(trainer.model, dataset).overall
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    row = Row(config.fusion, config.pooling, accuracy, parameters, trainer.progress.seconds, comparison)
    (folder / SUMMARY).write_text(json.dumps(asdict(row) | {"config": asdict(config)}, indent=2) + "\n")
    return row


def write(folder: Path, rows: Sequence[Row], baselines: dict[str, float]) -> None:
    """The table as Markdown and as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = ("fusion", "pooling", "test accuracy", "parameters", "seconds of training", "ms a step", "plain ms")
    titles += ("speed-up", "peak MB", "plain peak MB", "largest loss difference")
    lines = []
    for row in rows:
        (ours, plain), (peak, plain_peak) = row.comparison.seconds, row.comparison.peak_bytes
        lines.append(
            [
                row.fusion,
                row.pooling,
                f"{row.accuracy:.2%}",
                f"{row.parameters}",
                f"{row.seconds:.0f}",
                f"{1e3 * ours:.1f}",
                f"{1e3 * plain:.1f}",
                f"{plain / ours:.2f}x",
                f"{peak / 1e6:.0f}",
                f"{plain_peak / 1e6:.0f}",
                f"{row.comparison.loss_difference:.1e}",
            ]
        )
    with (folder / CSV).open("w", newline="") as file:
        csv.writer(file).writerows([titles, *lines])
    text = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines)]
    told = [f"{name}: {share:.2%} of the test questions" for name, share in baselines.items()]
    (folder / TABLE).write_text("\n".join([*text, "", "Without a model, " + "; ".join(told) + ".", ""]))

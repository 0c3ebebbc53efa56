"""Every fusion and every pooling, trained with these kernels and in plain PyTorch: one table."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from python_models.vqa.config import Config
from python_models.vqa.evaluation import Accuracy
from python_models.vqa.modules import FUSIONS, POOLINGS
from python_models.vqa.training import Trainer

SUMMARY, TABLE, CSV = "summary.json", "results.md", "results.csv"
# What velm_kernels chooses by itself, and the written meaning of every operator in plain PyTorch.
BACKENDS = (None, "reference")


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Attributes:
        accuracy: share of right answers to the test questions.
        parameters: trained ones.
        seconds: of training.
        peak_bytes: of memory of the whole process.
        losses: of every epoch.
    """

    accuracy: float
    parameters: int
    seconds: float
    peak_bytes: int
    losses: list[float]

    @classmethod
    def of(cls, trainer: Trainer, accuracy: Accuracy) -> Summary:
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return cls(accuracy.overall, parameters, trainer.progress.seconds, peak, trainer.progress.losses)

    def save(self, folder: Path) -> None:
        (folder / SUMMARY).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Row:
    """One configuration with these kernels and in plain PyTorch."""

    config: Config
    ours: Summary
    plain: Summary

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of the losses of an epoch."""
        pairs = zip(self.ours.losses, self.plain.losses, strict=False)
        return max(abs(ours - plain) / plain for ours, plain in pairs)


def models() -> list[Config]:
    """Every fusion under question-guided attention, then every other pooling under the default fusion."""
    fusions = [Config(fusion=name) for name in FUSIONS]
    return fusions + [Config(pooling=name) for name in POOLINGS if name != Config.pooling]


def run(config: Config, backend: str | None, folder: Path, options: Sequence[str]) -> Summary:
    """Train in a process of its own, whose peak memory is that of this run alone.

    Raises:
        RuntimeError: training failed, with what it printed.
    """
    name = f"{config.fusion}-{config.pooling}-{backend or 'velm'}".replace(" ", "-")
    command = [sys.executable, "-m", "python_models", "vqa", "train", "--resume", "--folder", str(folder / name)]
    command += ["--fusion", config.fusion, "--pooling", config.pooling, *options]
    # All epochs, so that times compare.
    command += ["--patience", "1000", *(["--backend", backend] if backend else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    return Summary(**json.loads((folder / name / SUMMARY).read_text()))


def write(folder: Path, rows: Sequence[Row], baselines: dict[str, float]) -> None:
    """The table as Markdown and as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = ("fusion", "pooling", "test accuracy", "parameters", "seconds", "plain seconds", "speed-up")
    titles += ("peak MB", "plain peak MB", "largest loss difference")
    lines = []
    for row in rows:
        ours, plain = row.ours, row.plain
        lines.append(
            [
                row.config.fusion,
                row.config.pooling,
                f"{ours.accuracy:.2%}",
                f"{ours.parameters}",
                f"{ours.seconds:.0f}",
                f"{plain.seconds:.0f}",
                f"{plain.seconds / ours.seconds:.2f}x",
                f"{ours.peak_bytes / 1e6:.0f}",
                f"{plain.peak_bytes / 1e6:.0f}",
                f"{row.loss_difference:.1e}",
            ]
        )
    with (folder / CSV).open("w", newline="") as file:
        csv.writer(file).writerows([titles, *lines])
    text = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines)]
    told = [f"{name}: {share:.2%} of the test questions" for name, share in baselines.items()]
    (folder / TABLE).write_text("\n".join([*text, "", "Without a model, " + "; ".join(told) + ".", ""]))

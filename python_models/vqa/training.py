"""Training with early stopping, from checkpoints that go on exactly where they were written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from python_models.vqa.config import Config
from python_models.vqa.data import Dataset, Part
from python_models.vqa.model import VisualQuestionAnswering

CHECKPOINT, BEST, CONFIG = "checkpoint.pt", "best.pt", "config.json"


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        losses: mean of the cross-entropy over each epoch.
        accuracies: on the validation questions after each epoch.
        seconds: of training, without validation.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def epochs(self) -> int:
        return len(self.losses)

    @property
    def best(self) -> int:
        """The epoch, counted from 0, after which the validation questions were answered best; the first of equals."""
        return max(range(self.epochs), key=lambda epoch: (self.accuracies[epoch], -epoch))

    def is_finished(self, config: Config) -> bool:
        if self.epochs >= config.epochs:
            return True
        return bool(self.epochs) and self.epochs - 1 - self.best >= config.patience


class Step(NamedTuple):
    """A step of training: its number from 1, of how many, on how many questions, their mean loss, and its time."""

    number: int
    steps: int
    questions: int
    loss: float
    seconds: float


def features(dataset: Dataset, part: Part, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Regions and sentences of some questions."""
    return dataset.regions[part.picture[rows]], dataset.sentences[part.question[rows]]


@torch.inference_mode()
def predictions(model: nn.Module, dataset: Dataset, part: Part, batch: int = 512) -> Tensor:
    """int64 ``(questions,)``, the position of the likeliest answer."""
    model.eval()
    found = [model(*features(dataset, part, rows)).logits.argmax(1) for rows in torch.arange(len(part)).split(batch)]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


class Trainer:
    """One run: a model, its optimizer, its random numbers and what it has done.

    Args:
        config: what to train.
        dataset: on what.
        folder: where checkpoints go; None keeps none.
    """

    def __init__(self, config: Config, dataset: Dataset, folder: Path | None = None) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.progress = Progress()
        torch.manual_seed(config.seed)
        self.model = VisualQuestionAnswering(config, len(dataset.answers), dataset.regions.shape[1])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.random = torch.get_rng_state()

    def save(self) -> None:
        """Write the checkpoint, and the weights again if they are the best so far."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.save(self.folder / CONFIG)
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random,
            "progress": asdict(self.progress),
        }
        # A run that is stopped while it writes leaves the file of the epoch before.
        for name, content in ((CHECKPOINT, state), (BEST, self.model.state_dict())):
            if name == CHECKPOINT or self.progress.best == self.progress.epochs - 1:
                unfinished = self.folder / f"{name}.part"
                torch.save(content, unfinished)
                unfinished.replace(self.folder / name)

    def resume(self) -> bool:
        """Go on from the checkpoint of the folder, if there is one.

        Raises:
            ValueError: it was written by another configuration.
        """
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return False
        state: dict[str, Any] = torch.load(self.folder / CHECKPOINT, weights_only=True)
        ours, theirs = asdict(self.config), state["config"]
        # Longer training goes on as the shorter one would have.
        different = [name for name in ours if ours[name] != theirs.get(name) and name not in ("epochs", "patience")]
        if different:
            told = ", ".join(f"{name} {theirs.get(name)!r}, now {ours[name]!r}" for name in different)
            raise ValueError(f"{self.folder} holds a run of another configuration: {told}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random = state["random"]
        self.progress = Progress(**state["progress"])
        return True

    def steps(self) -> Iterator[Step]:
        """Train on every question once. The random numbers are this trainer's own: others may take steps in between."""
        part = self.dataset.parts["train"]
        torch.set_rng_state(self.random)
        batches = torch.randperm(len(part)).split(self.config.batch)
        self.random = torch.get_rng_state()
        for number, rows in enumerate(batches):
            begin = time.perf_counter()
            torch.set_rng_state(self.random)
            self.model.train()
            loss = self.loss(part, rows)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            value = float(loss.detach())
            self.random = torch.get_rng_state()
            yield Step(number + 1, len(batches), len(rows), value, time.perf_counter() - begin)

    def loss(self, part: Part, rows: Tensor) -> Tensor:
        """The cross-entropy of the answers to some questions."""
        logits = self.model(*features(self.dataset, part, rows)).logits
        return nn.functional.cross_entropy(logits, part.answer[rows])

    def epoch(self, report: Callable[[Step], None] = lambda step: None) -> None:
        """Train on every question once, calling ``report`` after each step, then answer the validation questions."""
        total, questions = 0.0, 0
        for step in self.steps():
            total += step.loss * step.questions
            questions += step.questions
            self.progress.seconds += step.seconds
            report(step)
        held = self.dataset.parts["validation"]
        right = predictions(self.model, self.dataset, held) == held.answer
        self.progress.losses.append(total / questions)
        self.progress.accuracies.append(float(right.float().mean()))
        self.save()

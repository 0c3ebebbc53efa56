"""What distinguishes one trained model from another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """Everything that a run can be repeated from.

    Attributes:
        fusion: name of a module that joins question and picture, of `fusions.FUSIONS`.
        pooling: name of a module that makes one vector of a picture's regions, of `poolings.POOLINGS`.
        form: of these two: "velm", this library's, or "plain", the same in plain PyTorch.
        dim: size of regions and questions as they meet.
        fused: size of what the fusion returns.
        heads: of question-guided attention.
        dropout: before the classifier.
        batch: questions per step.
        epochs: passes over the training questions, at most.
        patience: epochs without a better validation accuracy after which training stops.
        learning_rate, weight_decay: of AdamW.
        seed: of weights, order of questions and dropout.
    """

    fusion: str = "mlb"
    pooling: str = "attention"
    form: str = "velm"
    dim: int = 128
    fused: int = 128
    heads: int = 4
    dropout: float = 0.1
    batch: int = 256
    epochs: int = 30
    patience: int = 6
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Config:
        given = json.loads(path.read_text())
        if unknown := set(given) - {field.name for field in fields(cls)}:
            raise ValueError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
        return cls(**given)

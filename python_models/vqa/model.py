"""From features to answers: regions pooled by the question, joined with it, classified."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from python_models.vqa import encoders
from python_models.vqa.config import Config
from python_models.vqa.fusions import FUSIONS, Forms
from python_models.vqa.poolings import POOLINGS


class Answers(NamedTuple):
    """Logits ``(batch, answers)`` and, where the pooling weighs regions and the model does not train, their weights
    ``(batch, regions)``."""

    logits: Tensor
    weights: Tensor | None


def _named(table: dict[str, Forms], setting: str, config: Config) -> Callable[..., nn.Module]:
    name = getattr(config, setting)
    if name not in table:
        raise ValueError(f"{setting}: expected one of {', '.join(sorted(table))}, given {name!r}")
    if config.form not in Forms._fields:
        raise ValueError(f"form: expected one of {', '.join(Forms._fields)}, given {config.form!r}")
    return getattr(table[name], config.form)


class VisualQuestionAnswering(nn.Module):
    """Takes features as `encoders` make them.

    Args:
        config: which modules, and how large.
        answers: number of answers to choose from.
        regions: of a picture.

    Raises:
        ValueError: the configuration names no known module.
    """

    def __init__(self, config: Config, answers: int, regions: int = encoders.GRID**2) -> None:
        super().__init__()
        pool, fuse = _named(POOLINGS, "pooling", config), _named(FUSIONS, "fusion", config)
        self.regions = nn.Sequential(
            nn.LayerNorm(encoders.REGION_DIM), nn.Linear(encoders.REGION_DIM, config.dim), nn.GELU()
        )
        self.places = nn.Parameter(0.02 * torch.randn(regions, config.dim))
        self.question = nn.Sequential(nn.Linear(encoders.QUESTION_DIM, config.dim), nn.GELU())
        self.pool = pool(config.dim, config.heads)
        self.fuse = fuse([config.dim, config.dim], config.fused)
        self.classify = nn.Sequential(
            nn.LayerNorm(config.fused), nn.Dropout(config.dropout), nn.Linear(config.fused, answers)
        )

    def forward(self, regions: Tensor, question: Tensor) -> Answers:
        """Of ``(batch, regions, REGION_DIM)`` and ``(batch, QUESTION_DIM)``."""
        words = self.question(question)
        pooled, weights = self.pool(self.regions(regions) + self.places, words)
        return Answers(self.classify(self.fuse([pooled, words])), weights)

"""How often the answers are right, of which questions, and beside what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from python_models.vqa import encoders, training
from python_models.vqa.data import Dataset, kind


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers, of all questions and of those of each `kind`."""

    overall: float
    by_kind: dict[str, float]


def accuracy(model: nn.Module, dataset: Dataset, part: str = "test") -> Accuracy:
    """Of a trained model on the questions of a part."""
    asked = dataset.parts[part]
    right = training.predictions(model, dataset, asked) == asked.answer
    kinds = [kind(dataset.answers[int(answer)]) for answer in asked.answer]
    by_kind = {}
    for name in sorted(set(kinds)):
        rows = torch.tensor([other == name for other in kinds])
        by_kind[name] = float(right[rows].float().mean())
    return Accuracy(float(right.float().mean()), by_kind)


@dataclass(frozen=True)
class Prediction:
    """One question about one picture.

    Attributes:
        answers: the likeliest answers and their probabilities, the likeliest first.
        weights: ``(GRID, GRID)``, how much each region of the picture counted, summing to 1; None from a pooling that
            does not weigh them.
    """

    answers: list[tuple[str, float]]
    weights: Tensor | None


@torch.inference_mode()
def predict(
    model: nn.Module, answers: tuple[str, ...], picture: Image.Image, question: str, count: int = 3
) -> Prediction:
    """Answer a question about any picture, both encoded here."""
    regions = encoders.PictureEncoder()(encoders.pixels(picture)[None])
    return _prediction(model, answers, regions, encoders.QuestionEncoder()([question]), count)


@torch.inference_mode()
def answered(model: nn.Module, dataset: Dataset, part: str, row: int, count: int = 3) -> Prediction:
    """The answer to a question of the data, whose picture and sentence are encoded already."""
    features = training.features(dataset, dataset.parts[part], torch.tensor([row]))
    return _prediction(model, dataset.answers, *features, count)


def _prediction(
    model: nn.Module, answers: tuple[str, ...], regions: Tensor, sentence: Tensor, count: int
) -> Prediction:
    model.eval()
    logits, weights = model(regions, sentence)
    likely = logits[0].softmax(0).topk(min(count, len(answers)))
    named = [(answers[int(at)], float(p)) for p, at in zip(likely.values, likely.indices, strict=True)]
    grid = (encoders.GRID, encoders.GRID)
    return Prediction(named, None if weights is None else weights[0].view(grid))

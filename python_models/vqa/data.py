"""Pictures and questions of the easy-vqa package (V. Zhou, 2019) as features, in three parts that share no picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import easy_vqa
import torch
from PIL import Image
from torch import Tensor

from python_models.vqa import encoders

# Every so many training pictures one is kept for choosing when to stop.
VALIDATION_EVERY = 10
# Of the format of the cached file and of what the encoders compute.
VERSION = 1


@dataclass(frozen=True)
class Part:
    """Questions about pictures, as positions in the features of `Dataset`; all int64 ``(questions,)``."""

    picture: Tensor
    question: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.answer)


@dataclass(frozen=True)
class Dataset:
    """Features and the three parts.

    Attributes:
        regions: float32 ``(pictures, regions, REGION_DIM)``.
        texts: every different question.
        sentences: float32 ``(texts, QUESTION_DIM)``.
        answers: the possible answers in a fixed order.
        parts: "train", "validation" and "test"; the last one is the package's own.
        paths: of every picture.
    """

    regions: Tensor
    texts: tuple[str, ...]
    sentences: Tensor
    answers: tuple[str, ...]
    parts: dict[str, Part]
    paths: tuple[Path, ...]


def answers() -> tuple[str, ...]:
    """All possible answers in a fixed order."""
    return tuple(sorted(easy_vqa.get_answers()))


def kind(answer: str) -> str:
    """What sort of question has this answer: "yes or no", "shape" or "color"."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def _parts(texts: tuple[str, ...], answers: tuple[str, ...], train_pictures: int) -> dict[str, Part]:
    text_at = {text: number for number, text in enumerate(texts)}
    answer_at = {answer: number for number, answer in enumerate(answers)}

    def part(given: Iterable[Any], first: int) -> Part:
        questions, of, pictures = given
        return Part(
            torch.tensor(pictures) + first,
            torch.tensor([text_at[text] for text in questions]),
            torch.tensor([answer_at[answer] for answer in of]),
        )

    everything = part(easy_vqa.get_train_questions(), 0)
    kept = everything.picture % VALIDATION_EVERY == VALIDATION_EVERY - 1

    def chosen(rows: Tensor) -> Part:
        return Part(everything.picture[rows], everything.question[rows], everything.answer[rows])

    return {
        "train": chosen(~kept),
        "validation": chosen(kept),
        "test": part(easy_vqa.get_test_questions(), train_pictures),
    }


def load(
    cache: Path, report: Callable[[int, int], None] = lambda done, total: None, batch: int = 50, every: int = 1
) -> Dataset:
    """Encode every picture and question once, or read what an earlier call left in the file ``cache``.

    Args:
        cache: a file of about 80 MB, written if it is missing, of another version or of other pictures.
        report: called with the number of pictures encoded and their total.
        batch: pictures encoded at a time.
        every: of so many pictures one is kept, with the questions about it: a part of the data to try code with.
    """
    train, test = easy_vqa.get_train_image_paths(), easy_vqa.get_test_image_paths()
    everything = [Path(group[number]) for group in (train, test) for number in range(len(group))]
    # Of every tenth training picture, which validates, as many as of the others.
    kept_pictures = torch.tensor([n for n in range(len(everything)) if n // VALIDATION_EVERY % every == 0])
    paths = tuple(everything[number] for number in kept_pictures)
    texts = tuple(sorted({*easy_vqa.get_train_questions()[0], *easy_vqa.get_test_questions()[0]}))

    kept = torch.load(cache, weights_only=True) if cache.exists() else {}
    made_from = {"version": VERSION, "every": every, "texts": list(texts)}
    if {"every": 1} | {name: kept.get(name) for name in made_from if name in kept} != made_from:
        encode = encoders.PictureEncoder()
        regions = []
        for first in range(0, len(paths), batch):
            pictures = [encoders.pixels(Image.open(path)) for path in paths[first : first + batch]]
            regions.append(encode(torch.stack(pictures)))
            report(first + len(pictures), len(paths))
        sentences = encoders.QuestionEncoder()(texts)
        kept = made_from | {"regions": torch.cat(regions), "sentences": sentences}
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(".part")
        torch.save(kept, unfinished)
        unfinished.replace(cache)
    parts = _parts(texts, answers(), len(train))
    if every > 1:
        parts = {name: _about(part, kept_pictures) for name, part in parts.items()}
    return Dataset(kept["regions"], texts, kept["sentences"], answers(), parts, paths)


def _about(part: Part, pictures: Tensor) -> Part:
    """The questions about the sorted ``pictures`` alone, and the pictures numbered by their place among them."""
    rows = torch.isin(part.picture, pictures)
    return Part(torch.searchsorted(pictures, part.picture[rows]), part.question[rows], part.answer[rows])


def baselines(dataset: Dataset, part: str = "test") -> dict[str, float]:
    """Accuracy of the commonest answer, and of the commonest answer to the same question, the picture unseen."""
    train, asked = dataset.parts["train"], dataset.parts[part]
    counts = torch.zeros(len(dataset.texts), len(dataset.answers))
    counts.index_put_((train.question, train.answer), torch.ones(len(train)), accumulate=True)
    commonest = counts.sum(0).argmax()
    return {
        "commonest answer": float((asked.answer == commonest).float().mean()),
        "question only": float((asked.answer == counts.argmax(1)[asked.question]).float().mean()),
    }

"""The pictures, questions and answers of the easy-vqa package (V. Zhou, 2019), as tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import easy_vqa
import numpy as np
import torch
from PIL import Image
from torch import Tensor

# The pictures have 64 x 64 pixels and are enlarged, as models for larger pictures do.
IMAGE_SIZE = 80
# Of all training pictures: mostly a bright background.
MEAN, DEVIATION = 230.0, 50.0


class Tokenizer:
    """Word-level: every word of the training questions is a token; others become [UNK]."""

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]")

    def __init__(self, questions: Iterable[str]) -> None:
        words = [self.words(question) for question in questions]
        vocabulary = sorted({word for question in words for word in question})
        self.ids = {word: number for number, word in enumerate((*self.SPECIAL, *vocabulary))}
        self.length = 1 + max(map(len, words))

    @staticmethod
    def words(question: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", question.lower())

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, questions: Iterable[str]) -> Tensor:
        """int64 ``(questions, length)``: [CLS], the words, padding; what is longer is cut."""
        rows = []
        for question in questions:
            row = [self.ids["[CLS]"], *(self.ids.get(word, self.ids["[UNK]"]) for word in self.words(question))]
            rows.append((row + [self.ids["[PAD]"]] * self.length)[: self.length])
        return torch.tensor(rows, dtype=torch.int64).view(-1, self.length)


@dataclass(frozen=True)
class Split:
    """Questions about pictures.

    Attributes:
        pictures: uint8 ``(pictures, 3, IMAGE_SIZE, IMAGE_SIZE)``.
        questions: the texts.
        tokens: int64 ``(questions, length)``.
        picture: int64 ``(questions,)``, which picture a question is about.
        answer: int64 ``(questions,)``, index into `answers()`.
    """

    pictures: Tensor
    questions: tuple[str, ...]
    tokens: Tensor
    picture: Tensor
    answer: Tensor

    def __len__(self) -> int:
        return len(self.questions)


def answers() -> list[str]:
    """All possible answers, in a fixed order."""
    return sorted(easy_vqa.get_answers())


def _pictures(paths: dict[int, str]) -> Tensor:
    size = (IMAGE_SIZE, IMAGE_SIZE)
    opened = (Image.open(paths[number]).convert("RGB") for number in range(len(paths)))
    arrays = [np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) for picture in opened]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def load(tokenizer: Tokenizer | None = None) -> tuple[Split, Split, Tokenizer]:
    """Return the training and the held-out questions, which are about different pictures, and the tokenizer."""
    trained, held_out = easy_vqa.get_train_questions(), easy_vqa.get_test_questions()
    tokenizer = tokenizer or Tokenizer(trained[0])
    splits = []
    for (questions, given, pictures), paths in (
        (trained, easy_vqa.get_train_image_paths()),
        (held_out, easy_vqa.get_test_image_paths()),
    ):
        index = {answer: number for number, answer in enumerate(answers())}
        splits.append(
            Split(
                _pictures(paths),
                tuple(questions),
                tokenizer(questions),
                torch.tensor(pictures),
                torch.tensor([index[answer] for answer in given]),
            )
        )
    return splits[0], splits[1], tokenizer


def batch(split: Split, rows: Tensor) -> dict[str, Tensor]:
    """What ViLT takes, for the questions ``rows``."""
    tokens = split.tokens[rows]
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "token_type_ids": torch.zeros_like(tokens),
        "pixel_values": (split.pictures[split.picture[rows]].float() - MEAN) / DEVIATION,
        "pixel_mask": torch.ones(len(rows), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64),
    }


def baselines(train: Split, held_out: Split) -> dict[str, float]:
    """Accuracy on ``held_out`` of always giving the commonest answer, and the commonest one to the same question."""
    count = len(answers())
    commonest = int(torch.bincount(train.answer, minlength=count).argmax())
    by_question: dict[str, Tensor] = {}
    for question, answer in zip(train.questions, train.answer.tolist(), strict=True):
        by_question.setdefault(question, torch.zeros(count))[answer] += 1
    guesses = [int(by_question[q].argmax()) if q in by_question else commonest for q in held_out.questions]
    return {
        "commonest answer": float((held_out.answer == commonest).float().mean()),
        "commonest answer to the question, picture unseen": float(
            (torch.tensor(guesses) == held_out.answer).float().mean()
        ),
    }

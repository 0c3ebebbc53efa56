"""Questions of easy-vqa and their pictures as transformers' ViLT takes them: pixels and tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from python_models.vqa.data import Dataset, Part

# The pictures have 64 x 64 pixels and are enlarged, as models for larger pictures do.
IMAGE_SIZE = 80
# Of all training pictures: mostly a bright background.
MEAN, DEVIATION = 230.0, 50.0


class Tokenizer:
    """Word-level: every word of the questions is a token; others become [UNK]."""

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


@functools.lru_cache(maxsize=1024)
def pixels(path: Path) -> Tensor:
    """uint8 ``(3, IMAGE_SIZE, IMAGE_SIZE)``."""
    picture = Image.open(path).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def batch(dataset: Dataset, part: Part, rows: Tensor, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """What ViLT takes, for the questions ``rows`` of a part."""
    tokens = tokenizer(dataset.texts[number] for number in part.question[rows].tolist())
    pictures = torch.stack([pixels(dataset.paths[number]) for number in part.picture[rows].tolist()])
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).long(),
        "token_type_ids": torch.zeros_like(tokens),
        "pixel_values": (pictures.float() - MEAN) / DEVIATION,
        "pixel_mask": torch.ones(len(rows), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64),
    }

"""What splice_tokens is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.sequence.places import placeholders
from velm_kernels.sequence.splice_tokens import reference


def _spliced(draw: Draw, batch: int, tokens: int, vocabulary: int, dim: int) -> Arguments:
    """Picture tokens have an id behind the vocabulary; ids repeat."""
    mask, count = placeholders(batch, tokens)
    return {
        "token_ids": draw.integers(0, vocabulary, batch, tokens).masked_fill(mask, vocabulary),
        "embedding_weight": draw(vocabulary, dim),
        "features": draw(count, dim),
        "image_token_id": vocabulary,
    }


def _at_positions(draw: Draw, batch: int, tokens: int, vocabulary: int, dim: int) -> Arguments:
    """In another order than that of the tokens."""
    given = _spliced(draw, batch, tokens, vocabulary, dim)
    image_token_id = given.pop("image_token_id")
    return given | {"positions": (given["token_ids"] == image_token_id).reshape(-1).nonzero()[:, 0].flip(0)}


def _meaning(
    token_ids: Tensor,
    embedding_weight: Tensor,
    features: Tensor,
    image_token_id: int | None = None,
    positions: Any = None,
) -> Tensor:
    mask = torch.as_tensor(token_ids == image_token_id)
    if positions is not None:
        features, mask = features.flip(0), torch.zeros(token_ids.shape, dtype=torch.bool, device=token_ids.device)
        mask.view(-1)[positions] = True
    return reference.splice_tokens(token_ids, embedding_weight, features, mask)


CASES = [
    Case(
        "splice_tokens",
        name,
        make,
        _meaning,
        ("embedding_weight", "features"),
        sizes={"batch": 2, "tokens": 7, "vocabulary": 5, "dim": 12},
        larger={"batch": 3, "tokens": 130, "vocabulary": 90, "dim": 530},
        published={} if name else {"splice-tokens": {"batch": 1, "tokens": 8192, "vocabulary": 32000, "dim": 2048}},
        not_zero=("vocabulary",),
        numbers_only=bool(name),
    )
    for name, make in (("", _spliced), ("positions", _at_positions))
]

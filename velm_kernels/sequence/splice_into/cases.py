"""What splice_into is tried with."""

from __future__ import annotations

import torch

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.sequence.places import placeholders
from velm_kernels.sequence.splice_into import reference


def _spliced(draw: Draw, batch: int, tokens: int, dim: int) -> Arguments:
    mask, count = placeholders(batch, tokens)
    return {"embeddings": draw(batch, tokens, dim), "features": draw(count, dim), "mask": mask}


def _unread(arguments: Arguments) -> Arguments:
    return arguments | {"embeddings": arguments["embeddings"].masked_fill(arguments["mask"][..., None], torch.nan)}


CASES = [
    Case(
        "splice_into",
        "",
        _spliced,
        reference.splice_into,
        ("embeddings", "features"),
        sizes={"batch": 2, "tokens": 7, "dim": 12},
        larger={"batch": 3, "tokens": 130, "dim": 530},
        published={"splice-into": {"batch": 1, "tokens": 8192, "dim": 2048}},
        unread=_unread,
    )
]

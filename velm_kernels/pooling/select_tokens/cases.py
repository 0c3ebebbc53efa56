"""What select_tokens is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.select_tokens import reference


def _selected(draw: Draw, batch: int, tokens: int, dim: int) -> Arguments:
    return {"x": draw(batch, tokens, dim), "scores": draw(batch, tokens), "k": tokens // 2}


def _padded(draw: Draw, batch: int, tokens: int, dim: int) -> Arguments:
    """Equal scores, and of each entry another number of tokens."""
    given = {"k": tokens // 4 + torch.arange(batch) % 2 * (tokens // 8), "max_k": tokens // 2}
    return {"x": draw(batch, tokens, dim), "scores": draw.integers(0, 9, batch, tokens).float(), **given}


def _meaning(x: Tensor, scores: Tensor, k: int) -> Any:
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values
    taken = x.gather(1, indices[..., None].expand(*indices.shape, x.shape[-1]))
    return taken, indices, torch.full(scores.shape[:-1], k, dtype=torch.int32)


def _unread(arguments: Arguments) -> Arguments:
    """Tokens that are not taken."""
    x, scores, k = (arguments[name] for name in ("x", "scores", "k"))
    taken = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=x.device).scatter(1, taken, True)
    return arguments | {"x": x.masked_fill(~kept[..., None], torch.nan)}


CASES = [
    Case(
        "select_tokens",
        "",
        _selected,
        _meaning,
        ("x",),
        sizes={"batch": 2, "tokens": 8, "dim": 12},
        larger={"batch": 3, "tokens": 75, "dim": 90},
        published={"select": {"batch": 16, "tokens": 577, "dim": 1024}},
        unread=_unread,
    ),
    Case(
        "select_tokens",
        "padded",
        _padded,
        reference.select_tokens,
        ("x",),
        sizes={"batch": 2, "tokens": 8, "dim": 12},
        larger={"batch": 2, "tokens": 75, "dim": 90},
        numbers_only=True,
    ),
]

"""What interpolated_embedding is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.interpolated_embedding import reference

SIZES = {"batch": 2, "positions": 4, "height": 3, "width": 5, "dim": 12}
LARGER = {"batch": 3, "positions": 90, "height": 9, "width": 16, "dim": 90}


def _placed(mode: str, padding: str = "border") -> Any:
    def make(draw: Draw, batch: int, positions: int, height: int, width: int, dim: int) -> Arguments:
        """About a fifth of the positions lies outside."""
        spread = torch.tensor([height, width]) * 0.4
        place = draw(batch, positions, 2, wide=True)
        place = place * spread.to(place.dtype) + torch.tensor([height - 1, width - 1]) / 2
        given = {"weight": draw(height, width, dim), "positions": place, "mode": mode}
        return given if padding == "border" else given | {"padding": padding}

    return make


def _meaning(weight: Tensor, positions: Tensor, mode: str, padding: str = "border") -> Tensor:
    return reference.interpolated_embedding(weight, positions, mode, padding)


def _tapped(draw: Draw, batch: int, positions: int, height: int, width: int, dim: int) -> Arguments:
    rows = height * width
    indices = draw.integers(-1, rows, batch, positions, 9) if rows else torch.full((batch, positions, 9), -1)
    return {"weight": draw(rows, dim), "positions": (indices, draw(batch, positions, 9, wide=True))}


def _unread(arguments: Arguments) -> Arguments:
    indices, weights = arguments["positions"]
    weight = arguments["weight"].clone()
    weight[torch.bincount(indices[indices >= 0], minlength=len(weight)) == 0] = torch.nan
    return arguments | {"weight": weight, "positions": (indices, weights.masked_fill(indices < 0, torch.nan))}


CASES = [
    Case(
        "interpolated_embedding",
        "",
        _placed("bilinear"),
        _meaning,
        ("weight", "positions"),
        SIZES,
        LARGER,
        published={"qwen3-vl-table": {"batch": 1, "positions": 8192, "height": 48, "width": 48, "dim": 1152}},
        not_zero=("height", "width"),
        scaled=("weight",),
    ),
    Case(
        "interpolated_embedding",
        "bicubic",
        _placed("bicubic"),
        _meaning,
        ("weight", "positions"),
        SIZES,
        LARGER,
        published={"kimi-table": {"batch": 1, "positions": 4096, "height": 64, "width": 64, "dim": 1152}},
        not_zero=("height", "width"),
        scaled=("weight",),
        numbers_only=True,
    ),
    Case(
        "interpolated_embedding",
        "zeros",
        _placed("bicubic", "zeros"),
        _meaning,
        ("weight", "positions"),
        SIZES,
        LARGER,
        not_zero=("height", "width"),
        scaled=("weight",),
        numbers_only=True,
    ),
    Case(
        "interpolated_embedding",
        "taps",
        _tapped,
        lambda weight, positions: reference.taps(weight, *positions),
        ("weight",),
        SIZES,
        LARGER,
        unread=_unread,
    ),
]

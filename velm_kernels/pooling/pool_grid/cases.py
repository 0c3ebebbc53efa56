"""What pool_grid is tried with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.pool_grid import reference


def _alike(mode: str, factor: int, odd: int = 0) -> Any:
    def make(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
        rows, columns = factor * height + odd, factor * width + odd
        x = draw(batch, rows * columns, dim)
        return {"x": x, "height": rows, "width": columns, "factor": factor, "mode": mode}

    return make


def _sizes(batch: int, height: int, width: int, factor: int) -> tuple[list[int], list[int]]:
    """Maps of two sizes in turn."""
    entries = range(batch)
    return [factor * (height + i % 2) for i in entries], [factor * (width + (i + 1) % 2) for i in entries]


def _packed(mode: str, odd: int, listed: bool) -> Any:
    def make(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
        heights, widths = _sizes(batch, height, width, 2)
        heights = [size + odd for size in heights]
        tokens = sum(size * other for size, other in zip(heights, widths, strict=True))
        given = {"x": draw(tokens, dim), "height": heights, "width": widths, "factor": 2, "mode": mode}
        return (
            given if listed else given | {"height": torch.tensor(heights).long(), "width": torch.tensor(widths).int()}
        )

    return make


def _padded(mode: str, factor: int) -> Any:
    def make(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
        heights, widths = _sizes(batch, height, width, factor)
        tokens = max(map(_product, heights, widths), default=0) + 10
        sizes = {"height": torch.tensor(heights, dtype=torch.int64), "width": torch.tensor(widths, dtype=torch.int32)}
        return {"x": draw(batch, tokens, dim), **sizes, "factor": factor, "mode": mode}

    return make


def _product(height: int, width: int) -> int:
    return height * width


def _meaning(x: Tensor, height: Any, width: Any, factor: int, mode: str) -> Tensor:
    if isinstance(height, int):
        return reference.pool_grid(x, height, width, factor, mode)
    heights, widths = (list(size) if isinstance(size, Sequence) else size.tolist() for size in (height, width))
    areas = list(map(_product, heights, widths))
    if x.dim() == 2:
        pieces = [piece[None] for piece in x.split(areas)]
    else:
        pieces = [entry[None, :area] for entry, area in zip(x, areas, strict=True)]
    pooled = [
        reference.pool_grid(piece, *sizes, factor, mode)[0] if piece.shape[1] else piece[0]
        for piece, sizes in zip(pieces, zip(heights, widths, strict=True), strict=True)
    ]
    if x.dim() == 2:
        return torch.cat([x[:0], *pooled])
    rows = x.shape[1] // factor**2
    padded = [torch.cat([piece, piece.new_zeros(rows - len(piece), x.shape[2])]) for piece in pooled]
    return torch.stack(padded) if padded else x[:, :rows]


def _unread(arguments: Arguments) -> Arguments:
    x = arguments["x"].clone()
    for entry, height, width in zip(x, arguments["height"].tolist(), arguments["width"].tolist(), strict=True):
        entry[height * width :] = torch.nan
    return arguments | {"x": x}


def _unread_odd(arguments: Arguments) -> Arguments:
    height, width, factor = (arguments[name] for name in ("height", "width", "factor"))
    x = arguments["x"].clone()
    maps = x.view(len(x), height, width, x.shape[2])
    maps[:, height // factor * factor :] = torch.nan
    maps[:, :, width // factor * factor :] = torch.nan
    return arguments | {"x": x}


SIZES = {"batch": 2, "height": 2, "width": 3, "dim": 12}
LARGER = {"batch": 3, "height": 6, "width": 9, "dim": 90}
GEMMA_3 = {"batch": 4, "height": 16, "width": 16, "dim": 1152}

CASES = [
    Case(
        "pool_grid",
        "",
        _alike("mean", 4, odd=1),
        _meaning,
        ("x",),
        SIZES,
        LARGER,
        published={"gemma-3-pool": GEMMA_3},
        not_zero=("height", "width"),
        unread=_unread_odd,
    ),
    Case(
        "pool_grid",
        "bilinear",
        _alike("bilinear", 2, odd=1),
        _meaning,
        ("x",),
        SIZES,
        LARGER,
        published={"llava-onevision-pool": {"batch": 32, "height": 13, "width": 13, "dim": 1152}},
        not_zero=("height", "width"),
    ),
    Case(
        "pool_grid",
        "packed",
        _packed("mean", 0, listed=False),
        _meaning,
        ("x",),
        SIZES,
        LARGER,
        not_zero=("height", "width"),
    ),
    Case(
        "pool_grid",
        "packed-bilinear",
        _packed("bilinear", 1, listed=True),
        _meaning,
        ("x",),
        SIZES,
        LARGER,
        not_zero=("height", "width"),
        numbers_only=True,
    ),
    Case(
        "pool_grid",
        "padded",
        _padded("mean", 3),
        _meaning,
        ("x",),
        SIZES,
        LARGER,
        not_zero=("height", "width"),
        unread=_unread,
    ),
    Case(
        "pool_grid",
        "padded-bilinear",
        _padded("bilinear", 2),
        _meaning,
        ("x",),
        SIZES,
        LARGER,
        not_zero=("height", "width"),
        unread=_unread,
        numbers_only=True,
    ),
]

"""What merge_patches is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.pooling.merge_patches import reference


def _alike(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
    x = draw(batch, 4 * height * width, dim)
    return {"x": x, "grid_sizes": (2 * height, 2 * width), "factor": 2, "order": "channels"}


def _sizes(batch: int, height: int, width: int, factor: int) -> list[tuple[int, int]]:
    """Maps of two sizes in turn."""
    return [(factor * (height + entry % 2), factor * (width + (entry + 1) % 2)) for entry in range(batch)]


def _packed(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
    sizes = _sizes(batch, height, width, 2)
    return {"x": draw(sum(h * w for h, w in sizes), dim), "grid_sizes": sizes, "factor": 2}


def _packed_channels(draw: Draw, **sizes: int) -> Arguments:
    given = _packed(draw, **sizes)
    return given | {"grid_sizes": torch.tensor(given["grid_sizes"]).long().view(-1, 2), "order": "channels"}


def _padded(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
    sizes = _sizes(batch, height, width, 3)
    tokens = max([h * w for h, w in sizes], default=0) + 10
    grid_sizes = torch.tensor(sizes, dtype=torch.int64).view(batch, 2)
    return {"x": draw(batch, tokens, dim), "grid_sizes": grid_sizes, "factor": 3, "order": "channels"}


def _blocks(draw: Draw, batch: int, height: int, width: int, dim: int) -> Arguments:
    """Videos of two frames."""
    sizes = torch.tensor([(2, h, w) for h, w in _sizes(batch, height, width, 2)], dtype=torch.int32).view(batch, 3)
    x = draw(int(sizes.prod(1).sum()), dim)
    return {"x": x, "grid_sizes": sizes, "factor": 2, "order": "channels", "blocks": True}


def _meaning(x: Tensor, grid_sizes: Any, factor: int, order: str = "neighbours", blocks: bool = False) -> Tensor:
    if blocks:
        squares = x.view(-1, factor * factor, x.shape[1])
        return squares.transpose(1, 2).flatten(1)
    if isinstance(grid_sizes, tuple):
        return reference.merge_patches(x, grid_sizes[0], grid_sizes[1], factor, order)
    sizes = grid_sizes.tolist() if isinstance(grid_sizes, Tensor) else grid_sizes
    areas = [h * w for h, w in sizes]
    packed = x.dim() == 2
    pieces = x.split(areas) if packed else [entry[:area] for entry, area in zip(x, areas, strict=True)]
    merged = [
        reference.merge_patches(piece[None], size[0], size[1], factor, order)[0]
        for piece, size in zip(pieces, sizes, strict=True)
    ]
    features = factor * factor * x.shape[-1]
    if packed:
        return torch.cat([x.reshape(-1)[:0].view(0, features) if features else x.new_zeros(0, 0), *merged])
    rows = x.shape[1] // factor**2
    padded = [torch.cat([piece, piece.new_zeros(rows - len(piece), features)]) for piece in merged]
    return torch.stack(padded) if padded else x.new_zeros(0, rows, features) + 0 * x.sum()


def _unread(arguments: Arguments) -> Arguments:
    x = arguments["x"].clone()
    for entry, size in zip(x, arguments["grid_sizes"].tolist(), strict=True):
        entry[size[0] * size[1] :] = torch.nan
    return arguments | {"x": x}


SIZES = {"batch": 2, "height": 2, "width": 3, "dim": 12}
LARGER = {"batch": 3, "height": 6, "width": 9, "dim": 90}


def _case(name: str, make: Any, **more: Any) -> Case:
    return Case("merge_patches", name, make, _meaning, ("x",), SIZES, LARGER, not_zero=("height", "width"), **more)


CASES = [
    _case("listed", _packed, numbers_only=True),
    _case(
        "",
        _packed_channels,
        published={"mistral3-merger": {"batch": 2, "height": 31, "width": 64, "dim": 1024}},
    ),
    _case("alike", _alike, numbers_only=True),
    _case("padded", _padded, unread=_unread),
    _case("blocks", _blocks, numbers_only=True),
]

"""What outer_product_fusion is tried with."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.outer_product_fusion import reference


def _rows(draw: Draw, batch: int, dx: int, dy: int) -> Arguments:
    return {"x": draw(batch, dx), "y": draw(batch, dy)}


def _regions(draw: Draw, batch: int, regions: int, dx: int, dy: int) -> Arguments:
    masks = {"lengths": torch.full((batch,), max(regions - 1, 0)), "mask": draw.mask(batch, regions)}
    return {"x": draw(batch, regions, dx), "y": draw(batch, regions, dy), **masks}


def _live(x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    return mask & (torch.arange(x.shape[1], device=x.device) < lengths[:, None])


def _regions_meaning(x: Tensor, y: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    return reference.outer_product_fusion(x, y, _live(x, lengths, mask))


def _unread(arguments: Arguments) -> Arguments:
    hidden = ~_live(arguments["x"], arguments["lengths"], arguments["mask"])[..., None]
    return arguments | {name: arguments[name].masked_fill(hidden, torch.nan) for name in ("x", "y")}


CASES = [
    Case(
        "outer_product_fusion",
        "",
        _rows,
        reference.outer_product_fusion,
        ("x", "y"),
        sizes={"batch": 3, "dx": 4, "dy": 6},
        larger={"batch": 37, "dx": 50, "dy": 70},
        published={"outer-product": {"batch": 64, "dx": 256, "dy": 256}},
    ),
    Case(
        "outer_product_fusion",
        "regions",
        _regions,
        _regions_meaning,
        ("x", "y"),
        sizes={"batch": 3, "regions": 5, "dx": 4, "dy": 6},
        larger={"batch": 3, "regions": 75, "dx": 50, "dy": 70},
        published={"bilinear-pooling": {"batch": 8, "regions": 196, "dx": 512, "dy": 512}},
        unread=_unread,
    ),
]

"""What bilinear is tried with."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.bilinear import reference


def _rows(draw: Draw, batch: int, dx: int, dy: int, out: int) -> Arguments:
    return {"x": draw(batch, dx), "y": draw(batch, dy), "weight": draw(out, dx, dy), "bias": 10 * draw(out)}


def _regions(draw: Draw, batch: int, regions: int, dx: int, dy: int, out: int) -> Arguments:
    return _rows(draw, batch, dx, dy, out) | {"y": draw(batch, regions, dy)}


def _meaning(x: Tensor, y: Tensor, **others: Tensor) -> Tensor:
    return reference.bilinear(x[:, None] if y.dim() == 3 else x, y, **others)


_WANTED = ("x", "y", "weight", "bias")

CASES = [
    Case(
        "bilinear",
        "",
        _rows,
        _meaning,
        _WANTED,
        sizes={"batch": 5, "dx": 4, "dy": 6, "out": 8},
        larger={"batch": 90, "dx": 50, "dy": 70, "out": 30},
        published={
            "bilinear": {"batch": 64, "dx": 512, "dy": 512, "out": 256},
            "bilinear-small": {"batch": 256, "dx": 33, "dy": 129, "out": 128},
        },
    ),
    Case(
        "bilinear",
        "regions",
        _regions,
        _meaning,
        _WANTED,
        sizes={"batch": 3, "regions": 5, "dx": 4, "dy": 6, "out": 8},
        larger={"batch": 37, "regions": 5, "dx": 70, "dy": 90, "out": 30},
        published={"bilinear-regions": {"batch": 16, "regions": 36, "dx": 256, "dy": 256, "out": 128}},
    ),
]

"""What compact_bilinear is tried with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.compact_bilinear import make_sketch, reference


def _regions(draw: Draw, batch: int, regions: int, dx: int, dy: int, dim: int) -> Arguments:
    return {
        "x": draw(batch, dx),
        "y": draw(batch, regions, dy),
        "sketch_x": make_sketch(dx, dim, seed=1),
        "sketch_y": make_sketch(dy, dim, seed=2),
        "dim": dim,
    }


def _meaning(x: Tensor, y: Tensor, dim: int, **others: Any) -> Tensor:
    if not y.numel():  # nothing that torch.fft would take, or nothing to convolve with
        return (x.sum() + y.sum()) * y.new_zeros(*y.shape[:2], dim)
    return reference.compact_bilinear(x[:, None], y, dim=dim, **others)


CASES = [
    Case(
        "compact_bilinear",
        "",
        _regions,
        _meaning,
        ("x", "y"),
        sizes={"batch": 2, "regions": 5, "dx": 6, "dy": 8, "dim": 16},
        larger={"batch": 3, "regions": 37, "dx": 70, "dy": 90, "dim": 1000},
        published={"mcb-regions": {"batch": 8, "regions": 36, "dx": 2048, "dy": 2048, "dim": 16000}},
        not_zero=("dim",),
    )
]

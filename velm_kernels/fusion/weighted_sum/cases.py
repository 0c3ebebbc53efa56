"""What weighted_sum is tried with."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.weighted_sum import reference


def _regions_and_rows(draw: Draw, batch: int, regions: int, dim: int) -> Arguments:
    features = [draw(batch, regions, dim), draw(batch, dim), draw(batch, regions, dim)]
    return {"features": features, "weights": draw(batch, 3)}


def _meaning(features: list[Tensor], weights: Tensor) -> Tensor:
    return reference.weighted_sum(
        [value[:, None] if value.dim() == 2 else value for value in features], weights[:, None]
    )


CASES = [
    Case(
        "weighted_sum",
        "",
        _regions_and_rows,
        _meaning,
        ("features", "weights"),
        sizes={"batch": 2, "regions": 5, "dim": 12},
        larger={"batch": 3, "regions": 300, "dim": 90},
        published={"gated-fusion": {"batch": 32, "regions": 196, "dim": 768}},
    )
]

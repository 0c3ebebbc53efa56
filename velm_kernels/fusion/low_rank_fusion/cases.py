"""What low_rank_fusion is tried with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.low_rank_fusion import reference


def _one_row_for_every_region(draw: Draw, batch: int, regions: int, d0: int, d1: int, out: int, rank: int) -> Arguments:
    return {
        "inputs": [draw(batch, regions, d0), draw(batch, d1)],
        "factors": [draw(rank, 1 + d, out) * (1 + d) ** -0.5 for d in (d0, d1)],
        "weight": draw(rank),
        "bias": 3 * draw(out),
    }


def _meaning(inputs: list[Tensor], **others: Any) -> Tensor:
    return reference.low_rank_fusion([inputs[0], inputs[1][:, None]], **others)


CASES = [
    Case(
        "low_rank_fusion",
        "",
        _one_row_for_every_region,
        _meaning,
        ("inputs", "factors", "weight", "bias"),
        sizes={"batch": 3, "regions": 5, "d0": 6, "d1": 4, "out": 8, "rank": 2},
        larger={"batch": 3, "regions": 75, "d0": 9, "d1": 30, "out": 70, "rank": 3},
    )
]

"""What merge_topk is tried with."""

from __future__ import annotations

import torch

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.retrieval.merge_topk import reference


def _parts(draw: Draw, queries: int, of_a_part: int) -> Arguments:
    """Three parts, of which the last has found less."""
    number = torch.arange(of_a_part).expand(queries, of_a_part)
    indices = torch.stack([3 * number, 3 * number + 1, torch.where(number < of_a_part // 2, 3 * number + 2, -1)])
    return {"values": draw(3, queries, of_a_part), "indices": indices, "k": 4}


CASES = [
    Case(
        "merge_topk",
        "",
        _parts,
        reference.merge_topk,
        ("values",),
        sizes={"queries": 3, "of_a_part": 5},
        larger={"queries": 40, "of_a_part": 100},
    )
]

"""What tensor_fusion is tried with."""

from __future__ import annotations

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.tensor_fusion import reference


def _three_inputs(draw: Draw, batch: int, d0: int, d1: int, d2: int, out: int) -> Arguments:
    weight = draw(out, (1 + d0) * (1 + d1) * (1 + d2))
    return {"inputs": [draw(batch, d0), draw(batch, d1), draw(batch, d2)], "weight": weight, "bias": 10 * draw(out)}


CASES = [
    Case(
        "tensor_fusion",
        "",
        _three_inputs,
        reference.tensor_fusion,
        ("inputs", "weight", "bias"),
        sizes={"batch": 3, "d0": 3, "d1": 4, "d2": 5, "out": 8},
        larger={"batch": 37, "d0": 9, "d1": 14, "d2": 30, "out": 20},
        published={"tensor-fusion-3": {"batch": 256, "d0": 32, "d1": 32, "d2": 128, "out": 128}},
    )
]

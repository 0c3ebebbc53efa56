"""What linear is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.linear.linear import reference


def _projected(activation: str | None, residual: bool) -> Callable[..., Arguments]:
    def make(draw: Draw, batch: int, rows: int, features: int, out: int) -> Arguments:
        arguments = {
            "x": draw(batch, rows, features),
            "weight": draw(out, features) * max(features, 1) ** -0.5,
            "bias": draw(out),
        }
        if activation:
            arguments["activation"] = activation
        return arguments | ({"residual": draw(batch, rows, out)} if residual else {})

    return make


def _meaning(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None, **given: Any) -> Tensor:
    return reference.linear(x, weight, bias, activation or "", **given)


CASES = [
    Case(
        "linear",
        name,
        _projected(activation, residual),
        _meaning,
        ("x", "weight", "bias", *(("residual",) if residual else ())),
        sizes={"batch": 2, "rows": 5, "features": 12, "out": 8},
        larger={"batch": 3, "rows": 37, "features": 70, "out": 90},
        numbers_only=activation == "relu",
    )
    for name, activation, residual in (("", None, False), ("gelu", "gelu", True), ("relu", "relu", True))
]

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


def _rows(batch: int, rows: int, features: int, out: int) -> dict[str, int]:
    return {"batch": batch, "rows": rows, "features": features, "out": out}


_MODELS = {
    "": {"projection": _rows(8, 256, 768, 768), "few-rows": _rows(1, 256, 768, 768)},
    "gelu": {"feed-forward-in": _rows(8, 256, 768, 3072), "feed-forward-out": _rows(8, 256, 3072, 768)},
}

CASES = [
    Case(
        "linear",
        name,
        _projected(activation, residual),
        _meaning,
        ("x", "weight", "bias", *(("residual",) if residual else ())),
        sizes=_rows(2, 5, 12, 8),
        # Past a block of depth, too, of what is as quick to compute.
        larger=_rows(3, 37, 401, 131) if activation == "relu" else _rows(3, 37, 70, 90),
        published=_MODELS.get(name, {}),
        numbers_only=activation == "relu",
    )
    for name, activation, residual in (("", None, False), ("gelu", "gelu", True), ("relu", "relu", True))
]

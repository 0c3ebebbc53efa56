"""What dropout_residual is tried with."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.dropout_residual import reference


def _with_residual(draw: Draw, batch: int, rows: int, dim: int) -> Arguments:
    return {"x": draw(batch, rows, dim), "residual": draw(batch, rows, dim), "dropout_p": 0.25, "seed": 7}


def _alone(draw: Draw, batch: int, rows: int, dim: int) -> Arguments:
    return {"x": draw(batch, rows, dim), "dropout_p": 0.25, "seed": 7}


def _meaning(x: Tensor, dropout_p: float, seed: Tensor, residual: Tensor | None = None) -> Tensor:
    count = x.shape[:-1].numel()
    given = None if residual is None else residual.reshape(count, x.shape[-1])
    return reference.dropout_residual(x.reshape(count, x.shape[-1]), given, seed, dropout_p).view(x.shape)


CASES = [
    Case(
        "dropout_residual",
        "",
        _with_residual,
        _meaning,
        ("x", "residual"),
        sizes={"batch": 2, "rows": 5, "dim": 12},
        larger={"batch": 3, "rows": 300, "dim": 90},
    ),
    Case(
        "dropout_residual",
        "alone",
        _alone,
        _meaning,
        ("x",),
        sizes={"batch": 2, "rows": 5, "dim": 12},
        larger={"batch": 3, "rows": 300, "dim": 90},
        numbers_only=True,
    ),
]

"""What factorized_pool is tried with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.fusion.factorized_pool import reference


def _pooled(**options: Any) -> Callable[..., Arguments]:
    def make(draw: Draw, batch: int, regions: int, factor: int, dim: int) -> Arguments:
        a, b = draw(batch, regions, factor * dim), draw(batch, 1, factor * dim)
        # The root of a sum that cancels is as inexact as the sum.
        return {"a": a.abs() + 0.1, "b": b.abs() + 0.1, "factor": factor, **options}

    return make


_WANTED, _NOT_ZERO = ("a", "b"), ("factor",)
_SIZES = {"batch": 2, "regions": 5, "factor": 3, "dim": 4}
_LARGER = {"batch": 2, "regions": 37, "factor": 5, "dim": 64}

CASES = [
    Case(
        "factorized_pool",
        "",
        _pooled(power_norm=True, l2_norm=True),
        reference.factorized_pool,
        _WANTED,
        sizes=_SIZES,
        larger=_LARGER,
        published={
            "mfb-tail": {"batch": 1, "regions": 1024, "factor": 5, "dim": 1000},
            "mlb-tail": {"batch": 1, "regions": 2048, "factor": 1, "dim": 1200},
        },
        not_zero=_NOT_ZERO,
    ),
    Case(
        "factorized_pool",
        "outer",
        _pooled(layout="outer"),
        reference.factorized_pool,
        _WANTED,
        sizes=_SIZES,
        larger=_LARGER,
        published={"mutan-tail": {"batch": 1, "regions": 1024, "factor": 10, "dim": 360}},
        not_zero=_NOT_ZERO,
        numbers_only=True,
    ),
    Case(
        "factorized_pool",
        "dropout",
        _pooled(l2_norm=True, dropout_p=0.25, seed=7),
        reference.factorized_pool,
        _WANTED,
        sizes=_SIZES,
        larger=_LARGER,
        not_zero=_NOT_ZERO,
        numbers_only=True,
    ),
]

"""What glu is tried with."""

from __future__ import annotations

from velm_kernels.cases import Case
from velm_kernels.fusion.glu import reference

CASES = [
    Case(
        "glu",
        "",
        lambda draw, batch, rows, dim: {"x": draw(batch, rows, dim), "gate": draw(batch, rows, dim)},
        reference.glu,
        ("x", "gate"),
        sizes={"batch": 2, "rows": 5, "dim": 12},
        larger={"batch": 3, "rows": 75, "dim": 300},
    )
]

"""What maxsim_contrastive_loss is tried with."""

from __future__ import annotations

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.losses.maxsim_contrastive_loss import reference


def _labelled(draw: Draw, queries: int, tokens: int, documents: int, length: int, dim: int) -> Arguments:
    return {
        "queries": draw(queries, tokens, dim),
        "documents": draw(documents, length, dim),
        "scale": 0.1,
        "labels": draw.integers(0, documents, queries),
        "label_smoothing": 0.1,
    }


CASES = [
    Case(
        "maxsim_contrastive_loss",
        "",
        _labelled,
        reference.maxsim_contrastive_loss,
        ("queries", "documents"),
        sizes={"queries": 3, "tokens": 4, "documents": 4, "length": 7, "dim": 12},
        larger={"queries": 3, "tokens": 17, "documents": 5, "length": 50, "dim": 40},
        # The mean of nothing is NaN, and every query has a document.
        not_zero=("queries", "documents"),
        scaled=("queries",),
    )
]

"""What topk_similarity is tried with."""

from __future__ import annotations

from typing import Any

import torch

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.retrieval.topk_similarity import reference

_SIZES = {"queries": 3, "rows": 9, "dim": 12}
_LARGER = {"queries": 35, "rows": 700, "dim": 90}
_BOTH = ("queries", "database")


def _found(k: int = 4, **settings: Any) -> Any:
    def make(draw: Draw, queries: int, rows: int, dim: int) -> Arguments:
        return {"queries": draw(queries, dim), "database": draw(rows, dim), "k": k, **settings}

    return make


def _some_rows(draw: Draw, queries: int, rows: int, dim: int) -> Arguments:
    """Queries in float32; some rows alone, of small sizes fewer than k, which have names in no order."""
    number = torch.arange(rows)
    return {
        "queries": draw(queries, dim, wide=True),
        "database": draw(rows, dim),
        "k": 8,
        "valid": number % 3 != 1,
        "ids": (number * 7 + 3) % max(1, rows) * 10**10,
    }


def _poisoned(arguments: Arguments) -> Arguments:
    return arguments | {"database": arguments["database"].masked_fill(~arguments["valid"][:, None], torch.nan)}


CASES = [
    Case(
        "topk_similarity",
        "",
        _found(),
        reference.topk_similarity,
        _BOTH,
        sizes=_SIZES,
        larger=_LARGER,
        published={"search": {"queries": 64, "rows": 200_000, "dim": 512}},
    ),
    Case("topk_similarity", "cosine", _found(metric="cosine"), reference.topk_similarity, _BOTH, _SIZES, _LARGER),
    Case("topk_similarity", "l2", _found(metric="l2"), reference.topk_similarity, _BOTH, _SIZES, _LARGER),
    Case(
        "topk_similarity",
        "some rows",
        _some_rows,
        reference.topk_similarity,
        _BOTH,
        sizes=_SIZES,
        larger=_LARGER | {"queries": 5},
        unread=_poisoned,
    ),
    # What few queries are multiplied by.
    Case(
        "topk_similarity",
        "few queries",
        _found(metric="cosine"),
        reference.topk_similarity,
        _BOTH,
        sizes=_SIZES | {"queries": 1},
        larger=_LARGER | {"queries": 3},
        numbers_only=True,
    ),
]

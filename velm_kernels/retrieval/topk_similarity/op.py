"""The operator topk_similarity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.operator import Operator
from velm_kernels.retrieval.topk_similarity.reference import by_place


def _shapes(a: Any) -> tuple[Tensor, Tensor]:
    shape = (a.queries.shape[0], a.k)
    wide = torch.promote_types(a.queries.dtype, torch.float32)
    return a.queries.new_empty(shape, dtype=wide), a.queries.new_empty(shape, dtype=torch.int64)


def _many(arguments: Arguments) -> list[str]:
    from velm_kernels.retrieval.topk_similarity import triton

    return triton.why_not(arguments)


# queries (queries, dim) and database (rows, dim), last stride 1, any row stride, of one dtype or queries in float32;
# valid (rows,) bool, ids (rows,) int64, contiguous; metric of `reference.METRICS`. values (queries, k) in float32, or
# float64 of float64, best first; places (queries, k) int64: numbers of rows, and -1 behind the last valid one, beside
# which values are -inf, of l2 inf. Of equal values the lower id or, without, the lower number comes first; NaN is the
# greatest. The gradient that comes in is contiguous.
OPERATOR = Operator(
    "topk_similarity",
    "Tensor queries, Tensor database, Tensor? valid, Tensor? ids, SymInt k, str metric",
    shapes=_shapes,
    reference=lambda queries, database, valid, ids, k, metric: by_place(queries, database, k, metric, valid, ids),
    results=("values", "places"),
    without_gradient=("places",),
    differentiable=("queries", "database"),
    # valid and ids are for derivatives of derivatives.
    saves=("queries", "database", "valid", "ids", "places"),
    gradient_shapes={
        "queries": lambda a: a.queries.new_empty(a.queries.shape),
        "database": lambda a: a.database.new_empty(a.database.shape),
    },
    triton="retrieval.topk_similarity.triton",
    cpu="retrieval.topk_similarity.cpu",
    reasons={"triton": _many},
    cuda=False,
    flops=lambda a: 2 * a.queries[0] * a.database[0] * a.queries[1],
    backward_flops=lambda a: 2 * a.queries[0] * a.k * a.queries[1] * (bool(a.wanted & 1) + bool(a.wanted & 2)),
)

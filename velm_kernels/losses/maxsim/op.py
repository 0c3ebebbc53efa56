"""The operator maxsim."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.losses.maxsim.reference import maxsim, nearest
from velm_kernels.operator import Operator


def _shapes(a: Any) -> tuple[Tensor, Tensor | None]:
    queries, tokens, _ = a.queries.shape
    documents = a.documents.shape[0]
    wide = torch.promote_types(a.queries.dtype, torch.float32)
    places = a.queries.new_empty((queries * tokens, documents), dtype=torch.int32) if a.records else None
    return a.queries.new_empty((queries, documents), dtype=wide), places


def meaning(
    queries: Tensor, documents: Tensor, query_mask: Tensor | None, document_mask: Tensor | None, records: bool
) -> tuple[Tensor, Tensor | None]:
    out = maxsim(queries, documents, query_mask, document_mask)
    if not records:
        return out, None
    places = nearest(queries, documents, query_mask, document_mask).transpose(1, 2)
    return out, places.reshape(queries.shape[0] * queries.shape[1], documents.shape[0]).to(torch.int32)


def _products(a: Any) -> int:
    queries, tokens, dim = a.queries
    return int(2 * queries * tokens * dim * a.documents[0] * a.documents[1])


def _rows(a: Any) -> int:
    rows, documents = a.places
    return int(2 * rows * documents * a.queries[2] * (bool(a.wanted & 1) + bool(a.wanted & 2)))


# queries (queries, tokens, dim) and documents (documents, tokens, dim) contiguous, of one dtype; masks contiguous.
# out (queries, documents) in float32, or float64 of float64; places, if `records`: of each row of queries and each
# document the token that is nearest, -1 for none. Of several the first, and NaN before all, as torch's maximum.
OPERATOR = Operator(
    "maxsim",
    "Tensor queries, Tensor documents, Tensor? query_mask, Tensor? document_mask, bool records",
    shapes=_shapes,
    reference=meaning,
    results=("out", "places"),
    may_be_absent=("places",),
    without_gradient=("places",),
    differentiable=("queries", "documents"),
    # The masks are for derivatives of derivatives.
    saves=("queries", "documents", "query_mask", "document_mask", "places"),
    triton="losses.maxsim.triton",
    cpu="losses.maxsim.cpu",
    cuda=False,
    flops=_products,
    backward_flops=_rows,
)

"""maxsim on the CPU: products by torch for some documents at a time, and in C++ the maxima and the sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import cpu
from velm_kernels.losses.products import arithmetic

# z (rows, documents * length), float32 or bfloat16; of each row and each of these documents the largest, and its place
# if asked for, into the columns of best (rows, all documents), float32, and places, int32, from `first` on.
cpu.declare(
    "maxsim_best(Tensor z, Tensor? query_mask, Tensor? document_mask, int length, int first, "
    "Tensor(a!) best, Tensor(b!)? places) -> ()"
)
cpu.declare(
    "maxsim_gradients(Tensor grad, Tensor queries, Tensor documents, Tensor places, Tensor(a!)? grad_queries, "
    "Tensor(b!)? grad_documents) -> ()"
)

Kernel = Callable[[str], Callable[..., Any]]
# Scores at a time: a second-level cache.
SCORES = 1 << 19


def maxsim_forward(
    kernel: Kernel,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    records: bool,
    out: Tensor,
    places: Tensor | None,
) -> None:
    count, length, _ = documents.shape
    # In float32: which of two is the larger one is not left to how 16 bits round. Where nobody asks which, the largest
    # in bfloat16 is as good as its own rounding.
    dtype = torch.float32 if records else arithmetic(queries)
    rows = queries.flatten(0, 1).to(dtype)
    best = rows.new_zeros((len(rows), count), dtype=torch.float32)
    step = max(1, SCORES // max(1, len(rows) * length))
    room = rows.new_empty((len(rows), min(step, count) * length))
    if length == 0 and places is not None:
        places.fill_(-1)
    for first in range(0, count if length else 0, step):
        some = documents[first : first + step].to(dtype).flatten(0, 1)
        z = room[:, : len(some)]
        torch.mm(rows, some.t(), out=z)
        mask = None if document_mask is None else document_mask[first : first + step]
        kernel("maxsim_best")(z, query_mask, mask, length, first, best, places)
    torch.sum(best.view(*queries.shape[:2], count), 1, out=out)


def maxsim_backward(
    kernel: Kernel,
    grad: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    places: Tensor,
    records: bool,
    grad_queries: Tensor | None,
    grad_documents: Tensor | None,
) -> None:
    kernel("maxsim_gradients")(grad, queries, documents, places, grad_queries, grad_documents)

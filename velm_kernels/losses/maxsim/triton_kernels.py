"""Triton kernels of maxsim: the scores of a tile of rows with one document, of which the largest alone is kept, and the
gradients of what was chosen."""

from __future__ import annotations

import triton
import triton.language as tl

from velm_kernels.triton.kernels import product_add, round_to, to_int64


@triton.jit
def maxsim_kernel(
    queries,
    documents,
    query_mask,
    document_mask,
    best,
    places,
    rows,
    count,
    length,
    dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of rows (rows, dim) and a document (length, dim) the largest scores, best (rows, count), and where they are:
    of equal ones the first, of NaN the first."""
    document = tl.program_id(0) % count
    b_i = (tl.program_id(0) // count) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_in = b_i < rows
    b_counts = b_in
    if query_mask is not None:
        b_counts = b_in & (tl.load(query_mask + b_i, mask=b_in, other=0) != 0)
    b_best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_place = tl.full((BLOCK_M,), -1, tl.int32)
    p_queries = queries + to_int64(b_i)[:, None] * dim
    p_document = documents + to_int64(document) * length * dim
    for start in tl.range(0, length, BLOCK_N):
        b_j = start + tl.arange(0, BLOCK_N)
        b_ok = b_j < length
        if document_mask is not None:
            b_ok = b_ok & (tl.load(document_mask + to_int64(document) * length + b_j, mask=b_ok, other=0) != 0)
        b_z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.range(0, dim, BLOCK_K):
            b_k = first + tl.arange(0, BLOCK_K)
            b_q = tl.load(p_queries + b_k[None, :], mask=b_counts[:, None] & (b_k < dim)[None, :], other=0.0)
            p_d = p_document + to_int64(b_j)[None, :] * dim + b_k[:, None]
            b_d = tl.load(p_d, mask=b_ok[None, :] & (b_k < dim)[:, None], other=0.0)
            b_z = product_add(b_q, b_d, b_z, PRECISION)
        # NaN is above all, and the first of several is taken, as of equal ones.
        b_nan = (b_z != b_z) & b_ok[None, :]
        b_z = tl.where(b_ok[None, :] & (b_z == b_z), b_z, float("-inf"))
        b_high = tl.max(b_z, 1)
        b_taken = tl.where((b_z == b_high[:, None]) & b_ok[None, :] & (b_nan == 0), b_j[None, :], length)
        b_first = tl.min(b_taken, 1)
        b_first_nan = tl.min(tl.where(b_nan, b_j[None, :], length), 1)
        b_has_nan = b_first_nan < length
        b_is_open = b_best == b_best
        b_above = b_is_open & (b_first < length) & ((b_high > b_best) | (b_place < 0))
        b_place = tl.where(b_above, b_first, b_place)
        b_best = tl.where(b_above, b_high, b_best)
        b_place = tl.where(b_has_nan & b_is_open, b_first_nan, b_place)
        b_best = tl.where(b_has_nan & b_is_open, float("nan"), b_best)
    b_none = (b_place < 0) | (b_counts == 0)
    b_at = to_int64(b_i) * count + document
    tl.store(best + b_at, tl.where(b_none, 0.0, b_best), mask=b_in)
    if places is not None:
        tl.store(places + b_at, tl.where(b_none, -1, b_place), mask=b_in)


@triton.jit
def maxsim_grad_queries_kernel(
    grad, documents, places, grad_queries, tokens, count, length, dim, column_blocks, BLOCK: tl.constexpr
):
    """Of a row of queries: the sum over documents of grad times the chosen row."""
    row = to_int64(tl.program_id(0) // column_blocks)
    b_k = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for document in tl.range(0, count):
        place = tl.load(places + row * count + document)
        g = tl.load(grad + (row // tokens) * count + document)
        p_row = documents + (to_int64(document) * length + tl.maximum(place, 0)) * dim
        # Nothing is read where nothing was chosen.
        b_there = b_k < tl.where(place >= 0, dim, 0)
        b_row = tl.load(p_row + b_k, mask=b_there, other=0.0).to(tl.float32)
        b_sum += tl.where(b_there, g * b_row, 0.0)
    p_grad = grad_queries + row * dim + b_k
    tl.store(p_grad, round_to(b_sum, grad_queries.dtype.element_ty), mask=b_k < dim)


@triton.jit
def maxsim_grad_documents_kernel(
    grad,
    queries,
    places,
    grad_documents,
    rows,
    tokens,
    count,
    length,
    dim,
    column_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a row of a document: the sum over rows of queries that chose it of grad times them."""
    row = tl.program_id(0) // column_blocks
    document, place = row // length, row % length
    b_k = (tl.program_id(0) % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for start in tl.range(0, rows, BLOCK_M):
        b_i = start + tl.arange(0, BLOCK_M)
        b_chosen = tl.load(places + to_int64(b_i) * count + document, mask=b_i < rows, other=-1)
        b_chose = b_chosen == place
        b_g = tl.load(grad + to_int64(b_i // tokens) * count + document, mask=b_chose, other=0.0)
        p_q = queries + to_int64(b_i)[:, None] * dim + b_k[None, :]
        b_sum += b_g[:, None] * tl.load(p_q, mask=b_chose[:, None] & (b_k < dim)[None, :], other=0.0).to(tl.float32)
    p_grad = grad_documents + to_int64(row) * dim + b_k
    tl.store(p_grad, round_to(tl.sum(b_sum, 0), grad_documents.dtype.element_ty), mask=b_k < dim)

"""maxsim by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends import triton as backend
from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.losses.maxsim.triton_kernels import (
    maxsim_grad_documents_kernel,
    maxsim_grad_queries_kernel,
    maxsim_kernel,
)
from velm_kernels.triton.launches import cdiv

# Tiles of scores; of float32, where a product is three of mma.sync, smaller ones.
TILE, NARROW = Config(64, 64, 4, 2), Config(32, 32, 4, 1)
# Triton 3.8 spills 8 bytes in the latter on sm_80, Triton 3.6 in this one.
MORE_WARPS = Config(32, 32, 8, 1)
# Rows of queries and columns of a gradient.
ROWS = Config(16, 128, 4, 1)
# Small tiles for the interpreter, so that small tests cross their edges.
SMALL = Config(16, 16, 4, 1)
# Features at a time, by element size.
STEP = {2: 64, 4: 32}


def maxsim_forward(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    records: bool,
    out: Tensor,
    places: Tensor | None,
) -> None:
    count, length, dim = documents.shape
    rows = queries.shape[0] * queries.shape[1]
    best = queries.new_empty((rows, count), dtype=torch.float32)
    arch = architecture(queries.device)
    config = SMALL if arch == 0 else NARROW if queries.dtype == torch.float32 else TILE
    if arch == 80 and config is NARROW and backend.version() == (3, 8):
        config = MORE_WARPS
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": 16 if arch == 0 else STEP[queries.dtype.itemsize],
        "PRECISION": precision(queries.dtype),
    }
    masks = (None if mask is None else mask.view(torch.uint8) for mask in (query_mask, document_mask))
    arguments = (queries, documents, *masks, best, places, rows, count, length, dim)
    launch("maxsim", maxsim_kernel, cdiv(rows, config.block_m) * count, arguments, constants, config)
    torch.sum(best.view(*queries.shape[:2], count), 1, out=out)


def maxsim_backward(
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
    count, length, dim = documents.shape
    tokens = queries.shape[1]
    rows = queries.shape[0] * tokens
    config = SMALL if architecture(queries.device) == 0 else ROWS
    column_blocks = cdiv(dim, config.block_n)
    if grad_queries is not None:
        arguments = (grad, documents, places, grad_queries, tokens, count, length, dim, column_blocks)
        constants = {"BLOCK": config.block_n}
        kernel = maxsim_grad_queries_kernel
        launch("maxsim_grad_queries", kernel, rows * column_blocks, arguments, constants, config)
    if grad_documents is not None:
        given = (grad, queries, places, grad_documents, rows, tokens, count, length, dim, column_blocks)
        constants = {"BLOCK_M": config.block_m, "BLOCK": config.block_n}
        kernel, grid = maxsim_grad_documents_kernel, count * length * column_blocks
        launch("maxsim_grad_documents", kernel, grid, given, constants, config)

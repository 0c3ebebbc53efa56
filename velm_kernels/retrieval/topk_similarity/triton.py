"""topk_similarity by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.backends import Arguments
from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.retrieval.topk_similarity.reference import METRICS, worst
from velm_kernels.retrieval.topk_similarity.triton_kernels import (
    topk_gradient_kernel,
    topk_keys_kernel,
    topk_pairs_kernel,
)
from velm_kernels.triton.launches import cdiv

# Tiles of scores; of float32, where a product is three of mma.sync, for more warps. Small tiles for the interpreter, so
# that small tests cross their edges.
TILE, WIDE, SMALL = Config(16, 64, 4, 2), Config(16, 64, 8, 2), Config(16, 16, 4, 1)
# Features at a time, by element size.
STEP = {2: 64, 4: 32}
# Columns of a row at a time.
ROWS = Config(1, 128, 4, 1)
# Rows that registers hold beside a tile.
MOST = 128
# Programs that a GPU is busy with.
PROGRAMS = 1024


def why_not(arguments: Arguments) -> list[str]:
    found = []
    if arguments["k"] > MOST:
        found.append(f"k is {arguments['k']}, and Triton's kernel keeps {MOST} rows of a query")
    if arguments["database"].shape[0] >= 2**31:
        found.append(f"there are {arguments['database'].shape[0]} rows, and Triton's kernel numbers 2^31")
    return found


def topk_similarity_forward(
    queries: Tensor,
    database: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    k: int,
    metric: str,
    values: Tensor,
    places: Tensor,
) -> None:
    count, rows, dim = queries.shape[0], database.shape[0], queries.shape[1]
    if k == 0 or count == 0:
        return
    arch = architecture(queries.device)
    config = SMALL if arch == 0 else WIDE if queries.dtype == torch.float32 else TILE
    blocks = cdiv(count, config.block_m)
    splits = max(1, min(cdiv(rows, config.block_n), 3 if arch == 0 else PROGRAMS // blocks))
    # Of one element a tile would be none.
    kept = max(2, 1 << (k - 1).bit_length())
    constants = {
        "METRIC": METRICS.index(metric),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": 16 if arch == 0 else STEP[database.dtype.itemsize],
        "KEPT": kept,
        "PRECISION": precision(queries.dtype),
    }
    keys = queries.new_empty((count, splits, kept), dtype=torch.int64)
    order = tie = None
    if ids is not None:
        order = ids.argsort(stable=True)
        tie = torch.empty_like(order, dtype=torch.int32)
        tie[order] = torch.arange(rows, dtype=torch.int32, device=ids.device)
    if queries.dtype != database.dtype:
        # One dtype in a product.
        database = database.to(queries.dtype)
    mask = None if valid is None else valid.view(torch.uint8)
    strides = (queries.stride(0), database.stride(0))
    arguments = (queries, database, mask, tie, keys, count, rows, dim, *strides, splits)
    launch("topk_keys", topk_keys_kernel, blocks * splits, arguments, constants, config)
    best = keys.flatten(1).topk(min(k, splits * kept), dim=1).values
    found = _places(best, order)
    found = torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-1)
    values.copy_(_similarities(queries, database, found, metric))
    _sort(values, found, ids, metric, places)


def _places(keys: Tensor, order: Tensor | None) -> Tensor:
    """The rows that keys are of, -1 of what is none."""
    after = 2147483647 - (keys & 0xFFFFFFFF)
    is_none = keys < -(1 << 63) + (1 << 32)
    after = after.masked_fill(is_none, 0)
    if order is not None and order.shape[0]:
        # Where a kernel was compiled and not executed, its keys are anything.
        after = order[after.clamp_(0, order.shape[0] - 1)]
    return after.masked_fill(is_none, -1)


def _similarities(queries: Tensor, database: Tensor, places: Tensor, metric: str) -> Tensor:
    """Of each query and what it has found: what decides about their order, summed in one way."""
    values = queries.new_empty(places.shape, dtype=torch.float32)
    arguments = (queries, database, places, None, values, None, None, None, places.shape[1], queries.shape[1])
    constants = {"METRIC": METRICS.index(metric), "BLOCK": ROWS.block_n}
    strides = (queries.stride(0), database.stride(0))
    launch("topk_pairs", topk_pairs_kernel, places.numel(), (*arguments, *strides), constants, ROWS)
    return values.masked_fill_(places < 0, worst(metric))


def _sort(values: Tensor, found: Tensor, ids: Tensor | None, metric: str, places: Tensor) -> None:
    """By similarity, then by id; what is none last."""
    by = found if ids is None or ids.shape[0] == 0 else torch.where(found < 0, found, ids[found.clamp(min=0)])
    order = by.sort(dim=1, stable=True).indices
    of_values = values.gather(1, order).sort(dim=1, descending=metric != "l2", stable=True).indices
    order = order.gather(1, of_values)
    is_none = (found.gather(1, order) < 0).to(torch.uint8)
    order = order.gather(1, is_none.sort(dim=1, stable=True).indices)
    places.copy_(found.gather(1, order))
    values.copy_(values.gather(1, order))


def topk_similarity_backward(
    grad: Tensor,
    queries: Tensor,
    database: Tensor,
    valid: Tensor | None,
    ids: Tensor | None,
    places: Tensor,
    k: int,
    metric: str,
    grad_queries: Tensor | None,
    grad_database: Tensor | None,
) -> None:
    dim, pairs = queries.shape[1], places.numel()
    constants = {"METRIC": METRICS.index(metric), "BLOCK": ROWS.block_n}
    strides = (queries.stride(0), database.stride(0))
    factors = grad
    own_query = own_row = None
    if metric == "cosine":
        factors, own_query, own_row = torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(grad)
        arguments = (queries, database, places, grad, None, factors, own_query, own_row, k, dim, *strides)
        launch("topk_pairs_backward", topk_pairs_kernel, pairs, arguments, constants, ROWS)
    column_blocks = cdiv(dim, ROWS.block_n)
    if grad_queries is not None:
        of_queries = (queries, database, places, None, None, factors, own_query, grad_queries, k, dim, *strides)
        grid = queries.shape[0] * column_blocks
        launch("topk_grad_queries", topk_gradient_kernel, grid, (*of_queries, column_blocks), constants, ROWS)
    if grad_database is not None:
        grad_database.zero_()
        sorted_places, order = places.flatten().sort(stable=True)
        stops = torch.searchsorted(sorted_places, sorted_places, right=True)
        # What is none comes first, as -1.
        before = torch.nn.functional.pad(sorted_places, (1, 0), value=-1)[:-1]
        stops.masked_fill_(before == sorted_places, 0)
        grid = pairs * column_blocks
        of_rows = (database, queries, places, order, stops, factors, own_row, grad_database, k, dim, *strides[::-1])
        launch("topk_grad_database", topk_gradient_kernel, grid, (*of_rows, column_blocks), constants, ROWS)

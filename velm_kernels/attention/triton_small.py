"""gated_residual and merge_attention by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

import torch

from velm_kernels.attention.merge import GRAD_LOGSUMEXPS, GRAD_OUTS, empty_heads_last
from velm_kernels.attention.triton_attention import FEW_PROGRAMS, sum_partials
from velm_kernels.attention.triton_problem import cdiv, row_strides
from velm_kernels.attention.triton_small_kernels import (
    gated_residual_backward_kernel,
    gated_residual_kernel,
    merge_backward_kernel,
    merge_kernel,
    merge_logsumexp_backward_kernel,
)
from velm_kernels.backends.triton import Config, dimension_class, launch

GRAD_X, GRAD_GATE = 1, 2
# Shards that one launch merges; more are merged in groups, whose results are merged in turn.
MERGED_AT_ONCE = 8
TILE = Config(8, 256, 4, 1)
ROWS = Config(16, 0, 4, 1)


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def gated_residual_forward(
    residual: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, row_mask: torch.Tensor | None
) -> torch.Tensor:
    """`velm::gated_residual_forward` by a Triton kernel."""
    rows, dim = x.shape
    out = x.new_empty((rows, dim), dtype=torch.promote_types(residual.dtype, x.dtype))
    dim_blocks = cdiv(dim, TILE.block_n)
    arguments = (
        residual,
        x,
        gate,
        _as_bytes(row_mask),
        out,
        residual.stride(0),
        x.stride(0),
        rows,
        dim,
        dim_blocks,
    )
    constants = {"GATE_IS_ROW": gate.numel() == dim, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch("gated_residual", gated_residual_kernel, cdiv(rows, TILE.block_m) * dim_blocks, arguments, constants, TILE)
    return out


def gated_residual_backward(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, row_mask: torch.Tensor | None, grad_mask: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`velm::gated_residual_backward` by Triton kernels."""
    rows, dim = grad.shape
    grad_x = x.new_empty((rows, dim)) if grad_mask & GRAD_X else None
    row_blocks, dim_blocks = cdiv(rows, TILE.block_m), cdiv(dim, TILE.block_n)
    steps = max(1, row_blocks * dim_blocks // (4 * FEW_PROGRAMS))
    row_programs = cdiv(row_blocks, steps)
    is_row = gate.numel() == dim
    partials = None
    if grad_mask & GRAD_GATE:
        shape = (row_programs, dim) if is_row else (row_programs * dim_blocks, 1)
        partials = grad.new_empty(shape, dtype=torch.float32)
    arguments = (
        grad,
        x if partials is not None else None,
        gate,
        _as_bytes(row_mask),
        grad_x,
        partials,
        x.stride(0),
        rows,
        dim,
        dim_blocks,
        steps,
    )
    constants = {"GATE_IS_ROW": is_row, "BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    grid = row_programs * dim_blocks
    launch("gated_residual_backward", gated_residual_backward_kernel, grid, arguments, constants, TILE)
    grad_gate = gate.new_empty((0,)) if partials is None else sum_partials(partials, torch.empty_like(gate))
    return x.new_empty((0,)) if grad_x is None else grad_x, grad_gate


def _merge(
    outs: list[torch.Tensor], logsumexps: list[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if len(outs) > MERGED_AT_ONCE:
        groups = [
            _merge(outs[i : i + MERGED_AT_ONCE], logsumexps[i : i + MERGED_AT_ONCE], torch.float32)
            for i in range(0, len(outs), MERGED_AT_ONCE)
        ]
        return _merge([out for out, _ in groups], [lse for _, lse in groups], dtype)
    _, heads, queries, dim = outs[0].shape
    rows = logsumexps[0].numel()
    out = empty_heads_last(outs[0].new_empty((), dtype=dtype), outs[0].shape)
    logsumexp = torch.empty_like(logsumexps[0])
    strides = tuple(row_strides(shard) for shard in outs)
    arguments = (tuple(outs), tuple(logsumexps), out, logsumexp, strides, row_strides(out), heads, queries, rows)
    constants = {"SHARDS": len(outs), "DIM": dim, "BLOCK_M": ROWS.block_m, "BLOCK_D": dimension_class(dim)}
    launch("merge", merge_kernel, cdiv(rows, ROWS.block_m), arguments, constants, ROWS)
    return out, logsumexp


def merge_attention_forward(
    outs: list[torch.Tensor], logsumexps: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`velm::merge_attention_forward` by a Triton kernel."""
    return _merge(outs, logsumexps, outs[0].dtype)


def merge_attention_backward(
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    outs: list[torch.Tensor],
    logsumexps: list[torch.Tensor],
    logsumexp: torch.Tensor,
    grad_mask: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`velm::merge_attention_backward` by Triton kernels."""
    _, heads, queries, dim = grad_out.shape
    rows, shards = logsumexp.numel(), len(logsumexps)
    grads = [empty_heads_last(grad_out, grad_out.shape) for _ in logsumexps] if grad_mask & GRAD_OUTS else []
    wants_lses = bool(grad_mask & GRAD_LOGSUMEXPS)
    products = logsumexp.new_empty((shards, rows)) if wants_lses else None
    constants = {"DIM": dim, "BLOCK_M": ROWS.block_m, "BLOCK_D": dimension_class(dim)}
    for shard, lse in enumerate(logsumexps):
        grad = grads[shard] if grads else None
        arguments = (
            grad_out,
            outs[shard] if wants_lses else None,
            lse,
            logsumexp,
            grad,
            None if products is None else products[shard],
            row_strides(grad_out),
            row_strides(outs[shard]) if wants_lses else None,
            None if grad is None else row_strides(grad),
            heads,
            queries,
            rows,
        )
        launch("merge_backward", merge_backward_kernel, cdiv(rows, ROWS.block_m), arguments, constants, ROWS)
    if products is None:
        return grads, []
    grad_lses = torch.empty_like(products)
    block = 128
    launch(
        "merge_logsumexp_backward",
        merge_logsumexp_backward_kernel,
        cdiv(rows, block),
        (products, torch.stack(logsumexps), logsumexp, grad_logsumexp, grad_lses, rows),
        {"SHARDS": shards, "BLOCK": block},
        Config(block, 0, 4, 1),
    )
    # Copies: results of an operator must not be views of one another.
    return grads, [grad.view(logsumexp.shape).clone() for grad in grad_lses]

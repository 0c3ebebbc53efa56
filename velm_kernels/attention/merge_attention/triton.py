"""merge_attention by Triton kernels: the launches."""

from __future__ import annotations

import torch

from velm_kernels.attention.merge_attention.triton_kernels import (
    merge_backward_kernel,
    merge_kernel,
    merge_logsumexp_backward_kernel,
)
from velm_kernels.attention.triton_problem import row_strides
from velm_kernels.backends.triton import Config, dimension_class, launch
from velm_kernels.triton.launches import cdiv

# Shards that one launch merges; more are merged in groups, whose results are merged in turn.
MERGED_AT_ONCE = 8
ROWS = Config(16, 0, 4, 1)


def merge_attention_forward(
    outs: list[torch.Tensor], logsumexps: list[torch.Tensor], out: torch.Tensor, logsumexp: torch.Tensor
) -> None:
    if len(outs) > MERGED_AT_ONCE:
        groups = []
        for i in range(0, len(outs), MERGED_AT_ONCE):
            groups.append((torch.empty_like(out, dtype=torch.float32), torch.empty_like(logsumexp)))
            merge_attention_forward(outs[i : i + MERGED_AT_ONCE], logsumexps[i : i + MERGED_AT_ONCE], *groups[-1])
        merge_attention_forward([out for out, _ in groups], [lse for _, lse in groups], out, logsumexp)
        return
    _, heads, queries, dim = out.shape
    rows = logsumexp.numel()
    strides = tuple(row_strides(shard) for shard in outs)
    arguments = (tuple(outs), tuple(logsumexps), out, logsumexp, strides, row_strides(out), heads, queries, rows)
    constants = {"SHARDS": len(outs), "DIM": dim, "BLOCK_M": ROWS.block_m, "BLOCK_D": dimension_class(dim)}
    launch("merge", merge_kernel, cdiv(rows, ROWS.block_m), arguments, constants, ROWS)


def merge_attention_backward(
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    outs: list[torch.Tensor],
    logsumexps: list[torch.Tensor],
    logsumexp: torch.Tensor,
    grad_outs: list[torch.Tensor | None],
    grad_logsumexps: list[torch.Tensor | None],
) -> None:
    _, heads, queries, dim = grad_out.shape
    rows, shards = logsumexp.numel(), len(logsumexps)
    wants_lses = any(to is not None for to in grad_logsumexps)
    products = logsumexp.new_empty((shards, rows)) if wants_lses else None
    constants = {"SHARDS": shards, "DIM": dim, "BLOCK_M": ROWS.block_m, "BLOCK_D": dimension_class(dim)}
    for shard, lse in enumerate(logsumexps):
        grad = grad_outs[shard]
        if grad is None and products is None:
            continue
        arguments = (
            grad_out,
            outs[shard] if wants_lses else None,
            lse,
            tuple(logsumexps),
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
        return
    # Its loop over the shards is one of the device, over rows of one tensor.
    all_grads = torch.empty_like(products)
    block = 128
    launch(
        "merge_logsumexp_backward",
        merge_logsumexp_backward_kernel,
        cdiv(rows, block),
        (products, torch.stack(logsumexps), logsumexp, grad_logsumexp, all_grads, rows),
        {"SHARDS": shards, "BLOCK": block},
        Config(block, 0, 4, 1),
    )
    for to, grad in zip(grad_logsumexps, all_grads, strict=True):
        if to is not None:
            to.copy_(grad.view(to.shape))

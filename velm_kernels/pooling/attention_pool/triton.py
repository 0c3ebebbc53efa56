"""The operator in the middle of attention_pool by Triton kernels: the launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from velm_kernels.backends.triton import Config, architecture, launch, precision
from velm_kernels.pooling.attention_pool.triton_kernels import (
    pooled_kernel,
    products_kernel,
    softmax_backward_kernel,
    softmax_kernel,
    tokens_kernel,
)
from velm_kernels.pooling.pool.triton import _strides, _tokens
from velm_kernels.pooling.pool.triton_kernels import Tokens
from velm_kernels.triton.launches import cdiv, sum_partials

# Rows and tokens of a tile; and columns, by element size.
TILE = Config(16, 32, 4, 2)
# With four warps per block, Triton 3.7 spills on sm_100 in what pools; with eight, Triton 3.9 on sm_80.
POOLED = {100: replace(TILE, num_warps=8)}
COLUMNS = {2: 64, 4: 32}
SOFTMAX = Config(256, 0, 4, 1)
# Programs that share the tokens of a segment, and tiles that one of them takes before there are more of them.
MOST_SPLITS, TILES_A_SPLIT = 16, 2


class _Middle:
    """What the kernels of one call share."""

    def __init__(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor | None,
        mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> None:
        self.x, self.rows, self.count, self.dim = x, rows, rows.shape[1], rows.shape[2]
        self.segments = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        all_tokens = x.shape[-2]
        self.tokens: Tokens = _tokens(lengths, mask, cu_seqlens, all_tokens, self.segments)
        self.strides = _strides(x)
        self.row_blocks = cdiv(self.count, TILE.block_m)
        of_segment = all_tokens if cu_seqlens is None else cdiv(all_tokens, max(self.segments, 1))
        self.splits = min(MOST_SPLITS, max(1, cdiv(of_segment, TILE.block_n * TILES_A_SPLIT)))
        shape = (self.segments, self.count, all_tokens) if cu_seqlens is None else (self.count, all_tokens)
        self.weights = x.new_empty(shape, dtype=torch.float32)
        self.constants: dict[str, Any] = {
            "PRECISION": precision(x.dtype),
            "BLOCK_M": TILE.block_m,
            "BLOCK_N": TILE.block_n,
            "BLOCK_D": COLUMNS[x.element_size()],
        }

    def products(self, a: torch.Tensor, weights: torch.Tensor) -> None:
        a_segment = 0 if a.shape[0] == 1 else self.count * self.dim
        arguments = (
            a,
            self.x,
            weights,
            self.tokens,
            self.strides,
            a_segment,
            self.count,
            self.dim,
            self.splits,
            self.row_blocks,
        )
        grid = self.segments * self.splits * self.row_blocks
        launch("attention_pool_products", products_kernel, grid, arguments, self.constants, TILE)

    def pooled(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        dim_blocks = cdiv(self.dim, self.constants["BLOCK_D"])
        arguments = (
            weights,
            self.x,
            out,
            self.tokens,
            self.strides,
            self.count,
            self.dim,
            self.row_blocks,
            dim_blocks,
        )
        grid = self.segments * self.row_blocks * dim_blocks
        config = POOLED.get(architecture(self.x.device), TILE)
        launch("attention_pool_pooled", pooled_kernel, grid, arguments, self.constants, config)


def attention_pool_forward(
    x: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    m = _Middle(x, rows, lengths, mask, cu_seqlens)
    m.products(rows, m.weights)
    arguments = (m.weights, logsumexp, m.tokens, m.count)
    constants = {"BLOCK": SOFTMAX.block_m}
    launch("attention_pool_softmax", softmax_kernel, m.segments * m.count, arguments, constants, SOFTMAX)
    m.pooled(m.weights, out)


def attention_pool_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_rows: torch.Tensor | None,
) -> None:
    m = _Middle(x, rows, lengths, mask, cu_seqlens)
    grad_weights = torch.empty_like(m.weights)
    m.products(rows, m.weights)
    # With one segment `grad` looks as if it were shared, and is read alike.
    m.products(grad, grad_weights)
    softmax = (m.weights, grad_weights, logsumexp, m.tokens, m.count)
    constants = {"BLOCK": SOFTMAX.block_m}
    grid = m.segments * m.count
    launch("attention_pool_softmax_backward", softmax_backward_kernel, grid, softmax, constants, SOFTMAX)
    if grad_x is not None:
        dim_blocks = cdiv(m.dim, m.constants["BLOCK_D"])
        arguments = (
            m.weights,
            grad_weights,
            grad,
            rows,
            grad_x,
            m.tokens,
            grad_x.stride(0) if x.dim() == 3 else 0,
            0 if rows.shape[0] == 1 else m.count * m.dim,
            m.count,
            m.dim,
            m.splits,
            dim_blocks,
        )
        grid = m.segments * m.splits * dim_blocks
        launch("attention_pool_tokens", tokens_kernel, grid, arguments, m.constants, TILE)
    if grad_rows is not None:
        if rows.shape[0] == m.segments:
            m.pooled(grad_weights, grad_rows)
        elif m.segments == 0:
            grad_rows.zero_()
        else:
            partials = rows.new_empty((m.segments, m.count, m.dim), dtype=torch.float32)
            m.pooled(grad_weights, partials)
            sum_partials(partials.view(m.segments, m.count * m.dim), grad_rows)

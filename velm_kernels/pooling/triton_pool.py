"""Pooling over tokens by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

from dataclasses import replace

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.pooling.pool import GEM, MEAN, MODES, _stats, empty_gradient
from velm_kernels.pooling.triton_pool_kernels import (
    Strides,
    Tokens,
    pool_backward_kernel,
    pool_counts_kernel,
    pool_kernel,
)
from velm_kernels.triton.launches import cdiv

# Columns side by side, and with tokens side by side fewer of them.
TILE = Config(16, 128, 4, 2)
TILE_OF_COLUMNS = Config(64, 32, 4, 2)
COUNTED = 1024


def _tokens(
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    tokens: int,
    segments: int,
) -> Tokens:
    return Tokens(lengths, None if mask is None else mask.view(torch.uint8), cu_seqlens, tokens, segments)


def _strides(x: torch.Tensor) -> Strides:
    return Strides(*x.stride()) if x.dim() == 3 else Strides(0, *x.stride())


def pool_forward(
    x: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    tokens_contiguous: bool,
    mode: int,
    p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`velm::pool_forward` by a Triton kernel."""
    tokens, dim = x.shape[-2:]
    segments = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out, stats = x.new_empty((segments, dim)), _stats(x, (segments, dim), mode)
    tile = TILE_OF_COLUMNS if tokens_contiguous else TILE
    if mode == GEM:
        # Two powers of every element take registers.
        tile = replace(tile, block_m=tile.block_m // 2)
    dim_blocks = cdiv(dim, tile.block_n)
    of_segment = _tokens(lengths, mask, cu_seqlens, tokens, segments)
    arguments = (x, out, stats, of_segment, _strides(x), p, dim, dim_blocks)
    constants = {"MODE": mode, "CUBE": p == 3.0, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launch(f"pool_{MODES[mode]}", pool_kernel, segments * dim_blocks, arguments, constants, tile)
    return out, stats


def pool_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    stats: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    tokens: int,
    tokens_contiguous: bool,
    mode: int,
    p: float,
) -> torch.Tensor:
    """`velm::pool_backward` by Triton kernels."""
    segments, dim = grad.shape
    grad_x = empty_gradient(grad, tokens, cu_seqlens is not None, tokens_contiguous)
    of_segment = _tokens(lengths, mask, cu_seqlens, tokens, segments)
    if segments == 0:
        return grad_x
    counts = None
    if mode in (MEAN, GEM):
        counts = torch.empty(segments, dtype=torch.int32, device=grad.device)
        config = Config(COUNTED, 0, 4, 1)
        launch("pool_counts", pool_counts_kernel, segments, (of_segment, counts), {"BLOCK": COUNTED}, config)
    tile = TILE_OF_COLUMNS if tokens_contiguous else TILE
    dim_blocks, token_blocks = cdiv(dim, tile.block_n), cdiv(tokens, tile.block_m)
    arguments = (
        grad,
        x,
        stats,
        counts,
        grad_x,
        of_segment,
        None if x is None else _strides(x),
        _strides(grad_x),
        p,
        dim,
        dim_blocks,
        token_blocks,
        segments.bit_length(),
    )
    constants = {"MODE": mode, "CUBE": p == 3.0, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    grid = (1 if cu_seqlens is not None else segments) * token_blocks * dim_blocks
    launch(f"pool_{MODES[mode]}_backward", pool_backward_kernel, grid, arguments, constants, tile)
    return grad_x

"""pool by Triton kernels: the launches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from velm_kernels.backends.triton import Config, launch
from velm_kernels.pooling.pool.op import GEM, LOGSUMEXP, MEAN, MODES
from velm_kernels.pooling.pool.triton_kernels import (
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
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens: int,
    segments: int,
) -> Tokens:
    return Tokens(lengths, None if mask is None else mask.view(torch.uint8), cu_seqlens, tokens, segments)


def _strides(x: Tensor) -> Strides:
    return Strides(*x.stride()) if x.dim() == 3 else Strides(0, *x.stride())


def pool_forward(
    x: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    tokens_contiguous: bool,
    mode: int,
    p: float,
    out: Tensor,
    stats: Tensor | None,
) -> None:
    tokens, (segments, dim) = x.shape[-2], out.shape
    tile = TILE_OF_COLUMNS if tokens_contiguous else TILE
    if mode in (LOGSUMEXP, GEM):
        # Two powers of every element, or a maximum beside the sum, take registers.
        tile = replace(tile, block_m=tile.block_m // 2)
    dim_blocks = cdiv(dim, tile.block_n)
    of_segment = _tokens(lengths, mask, cu_seqlens, tokens, segments)
    arguments = (x, out, stats, of_segment, _strides(x), p, dim, dim_blocks)
    constants = {"MODE": mode, "CUBE": p == 3.0, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launch(f"pool_{MODES[mode]}", pool_kernel, segments * dim_blocks, arguments, constants, tile)


def pool_backward(
    grad: Tensor,
    x: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    stats: Tensor,
    tokens: int,
    tokens_contiguous: bool,
    mode: int,
    p: float,
    grad_x: Tensor,
) -> None:
    segments, dim = grad.shape
    of_segment = _tokens(lengths, mask, cu_seqlens, tokens, segments)
    if segments == 0:
        return
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

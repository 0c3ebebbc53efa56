"""Selecting and merging tokens by Triton kernels: the launches, for tensors in canonical form."""

from __future__ import annotations

import torch

from velm_kernels.attention.triton_problem import cdiv
from velm_kernels.backends.triton import Config, launch, precision
from velm_kernels.pooling.triton_rows_kernels import gather_rows_kernel, inverse_norms_kernel, match_rows_kernel

TILE = Config(8, 256, 4, 1)
NORMS_TILE, NORMS_DEPTH = Config(32, 0, 4, 1), 64
# Of half precision and of float32, with the depth of a step.
MATCH_TILES = {2: (Config(64, 64, 4, 2), 64), 4: (Config(64, 32, 4, 1), 32)}


def gather_rows(
    x: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weight: torch.Tensor | None,
    back_index: torch.Tensor,
    back_offsets: torch.Tensor | None,
    back_weight: torch.Tensor | None,
) -> torch.Tensor:
    """`velm::gather_rows` by a Triton kernel."""
    batch, rows, dim = x.shape
    entries = index.shape[1]
    out_rows = entries if offsets is None else offsets.shape[1] - 1
    out = x.new_empty((batch, out_rows, dim))
    blocks, dim_blocks = cdiv(out_rows, TILE.block_m), cdiv(dim, TILE.block_n)
    sizes = (rows, entries, out_rows, dim, blocks, dim_blocks)
    arguments = (x, out, index, offsets, weight, x.stride(0), x.stride(1), *sizes)
    constants = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
    launch("gather_rows", gather_rows_kernel, batch * blocks * dim_blocks, arguments, constants, TILE)
    return out


def match_rows(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`velm::match_rows` by Triton kernels."""
    batch, rows, dim = a.shape
    norms = []
    for x in (a, b):
        norm = x.new_empty(x.shape[:2], dtype=torch.float32)
        norms.append(norm)
        of_norms = cdiv(x.shape[1], NORMS_TILE.block_m)
        norm_arguments = (x, norm, x.stride(0), x.stride(1), x.shape[1], dim, of_norms)
        sizes = {"BLOCK_M": NORMS_TILE.block_m, "BLOCK_D": NORMS_DEPTH}
        launch("inverse_norms", inverse_norms_kernel, batch * of_norms, norm_arguments, sizes, NORMS_TILE)
    similarity = a.new_empty((batch, rows), dtype=torch.float32)
    best = a.new_empty((batch, rows), dtype=torch.int32)
    tile, depth = MATCH_TILES[a.element_size()]
    blocks = cdiv(rows, tile.block_m)
    strides = (a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    arguments = (a, b, *norms, similarity, best, *strides, rows, b.shape[1], dim, blocks)
    constants = {
        "PRECISION": precision(a.dtype),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": depth,
    }
    launch("match_rows", match_rows_kernel, batch * blocks, arguments, constants, tile)
    return similarity, best

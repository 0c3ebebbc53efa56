"""multiscale_deformable_attention by Triton kernels: the launches.

The gradient of value is a sum at places that only the numbers know. Atomic additions would give other bits in every
run: corners are sorted by token, stably, and each token sums its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.attention.multiscale_deformable_attention.triton_kernels import (
    multiscale_deformable_attention_corners_kernel,
    multiscale_deformable_attention_kernel,
    multiscale_deformable_attention_samples_kernel,
    multiscale_deformable_attention_tokens_kernel,
)
from velm_kernels.backends.triton import Config, launch
from velm_kernels.triton.launches import cdiv

# Most models have heads of 32 columns.
TILE = Config(16, 32, 4, 1)
TOKENS = Config(32, 32, 4, 1)
CORNERS = Config(128, 0, 4, 1)


def _blocks(tile: Config) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


def multiscale_deformable_attention_forward(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor, out: Tensor
) -> None:
    batch, tokens, heads, d = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    blocks, dim_blocks = cdiv(queries, TILE.block_m), cdiv(d, TILE.block_n)
    sizes = (tokens, queries, heads, d, levels, points, blocks, dim_blocks)
    tensors = (value, spatial_shapes, sampling_locations, attention_weights, out)
    launch(
        "deformable",
        multiscale_deformable_attention_kernel,
        batch * heads * blocks * dim_blocks,
        (*tensors, *value.stride()[:3], *sizes),
        _blocks(TILE),
        TILE,
    )


def multiscale_deformable_attention_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_value: Tensor | None,
    grad_locations: Tensor | None,
    grad_weights: Tensor | None,
) -> None:
    batch, tokens, heads, d = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    given = (spatial_shapes, sampling_locations, attention_weights)
    if grad_locations is not None or grad_weights is not None:
        blocks = cdiv(queries, TILE.block_m)
        sizes = (tokens, queries, heads, d, levels, points, blocks)
        launch(
            "deformable_samples",
            multiscale_deformable_attention_samples_kernel,
            batch * heads * blocks,
            (grad, value, *given, grad_locations, grad_weights, *value.stride()[:3], *sizes),
            _blocks(TILE),
            TILE,
        )
    if grad_value is None:
        return
    corners = levels * points * 4
    token = grad.new_empty((batch * heads, queries * corners), dtype=torch.int32)
    share = grad.new_empty(token.shape, dtype=torch.float32)
    blocks = cdiv(queries, CORNERS.block_m)
    launch(
        "deformable_corners",
        multiscale_deformable_attention_corners_kernel,
        batch * heads * blocks,
        (*given, token, share, tokens, queries, heads, levels, points, blocks),
        {"BLOCK": CORNERS.block_m},
        CORNERS,
    )
    token, order = token.sort(dim=1, stable=True)
    bounds = torch.arange(tokens + 1, dtype=torch.int32, device=grad.device).expand(batch * heads, -1).contiguous()
    offsets = torch.searchsorted(token, bounds)
    blocks, dim_blocks = cdiv(tokens, TOKENS.block_m), cdiv(d, TOKENS.block_n)
    launch(
        "deformable_tokens",
        multiscale_deformable_attention_tokens_kernel,
        batch * heads * blocks * dim_blocks,
        (grad, order, offsets, share, grad_value, tokens, queries, heads, d, corners, blocks, dim_blocks),
        _blocks(TOKENS),
        TOKENS,
    )

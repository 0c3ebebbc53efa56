"""weighted_sum by Triton kernels: the launches."""

from __future__ import annotations

import torch

from velm_kernels.attention.triton_attention import sum_partials
from velm_kernels.attention.triton_problem import cdiv
from velm_kernels.backends.triton import Config, launch
from velm_kernels.fusion.weighted_sum import GRAD_WEIGHTS, empty_gradients, most_regions
from velm_kernels.fusion.weighted_sum.triton_kernels import weighted_sum_backward_kernel, weighted_sum_kernel

TILE = Config(8, 256, 4, 1)
CONSTANTS = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
# Features that one launch goes through: its code grows with their number.
AT_ONCE = 8


def _strides(x: torch.Tensor, regions: int) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.shape[1] == regions else 0


def weighted_sum_forward(features: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """`velm::weighted_sum_forward` by a Triton kernel."""
    batch, _, dim = features[0].shape
    regions, count = most_regions(features), len(features)
    row_blocks, column_blocks = cdiv(regions, TILE.block_m), cdiv(dim, TILE.block_n)
    sizes = (regions, dim, count, row_blocks, column_blocks)
    out = None
    for first in range(0, count, AT_ONCE):
        some = features[first : first + AT_ONCE]
        dtype = some[0].dtype if first + AT_ONCE >= count else torch.float32
        before, out = out, features[0].new_empty((batch, regions, dim), dtype=dtype)
        strides = tuple(_strides(x, regions) for x in some)
        arguments = (tuple(some), strides, weights[:, first:], before, out, *sizes)
        constants = {"FEATURES": len(some), **CONSTANTS}
        launch("weighted_sum", weighted_sum_kernel, batch * row_blocks * column_blocks, arguments, constants, TILE)
    assert out is not None
    return out


def weighted_sum_backward(
    grad: torch.Tensor, features: list[torch.Tensor], weights: torch.Tensor, broadcast: int, grad_mask: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """`velm::weighted_sum_backward` by Triton kernels."""
    grads, grad_weights = empty_gradients(grad, weights, broadcast, grad_mask)
    wants_weights = bool(grad_mask & GRAD_WEIGHTS)
    wanted = [to if grad_mask >> (i + 1) & 1 else None for i, to in enumerate(grads)]
    known: list[torch.Tensor | None] = list(features) if wants_weights else [None] * len(grads)
    everywhere = [i for i in range(len(grads)) if not broadcast >> i & 1]
    once = [i for i in range(len(grads)) if broadcast >> i & 1 and (wants_weights or wanted[i] is not None)]
    sums = _through(grad, known, wanted, weights, grad_weights if wants_weights else None, everywhere, bool(once))
    if once:
        # The sum of the gradient over the regions is that of a single one.
        _through(sums[:, None], known, wanted, weights, grad_weights if wants_weights else None, once, False)
    return grads, grad_weights


def _through(
    grad: torch.Tensor,
    features: list[torch.Tensor | None],
    grads: list[torch.Tensor | None],
    weights: torch.Tensor,
    grad_weights: torch.Tensor | None,
    chosen: list[int],
    wants_sums: bool,
) -> torch.Tensor:
    """Fills the gradients of the chosen features and of their weights; -> the sum of `grad` over its regions."""
    batch, regions, dim = grad.shape
    row_blocks, column_blocks = cdiv(regions, TILE.block_m), cdiv(dim, TILE.block_n)
    sums = None
    if wants_sums:
        sums = grad.new_empty((row_blocks, batch, dim), dtype=torch.float32)
    for first in range(0, max(1, len(chosen)), AT_ONCE):
        some = chosen[first : first + AT_ONCE]
        if not some and sums is None:
            break
        # No index tensor: that would be a copy to the device.
        own = weights.new_empty((batch, 0)) if not some else torch.stack([weights[:, i] for i in some], 1)
        products = None
        if grad_weights is not None and some:
            products = own.new_empty((row_blocks * column_blocks, *own.shape))
        values = tuple(features[i] for i in some)
        strides = tuple((0, 0) if x is None else _strides(x, regions) for x in values)
        arguments = (
            grad,
            values or None,
            strides or None,
            tuple(grads[i] for i in some) or None,
            own,
            products,
            sums if first == 0 else None,
            batch,
            regions,
            dim,
            len(some),
            row_blocks,
            column_blocks,
        )
        grid = batch * row_blocks * column_blocks
        constants = {"FEATURES": len(some), **CONSTANTS}
        launch("weighted_sum_backward", weighted_sum_backward_kernel, grid, arguments, constants, TILE)
        if products is not None and grad_weights is not None:
            for i, total in zip(some, sum_partials(products, torch.empty_like(own)).unbind(1), strict=True):
                grad_weights[:, i] = total
    return grad if sums is None else sum_partials(sums, sums.new_empty((batch, dim)))

"""weighted_sum by Triton kernels: the launches."""

from __future__ import annotations

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.fusion.weighted_sum.triton_kernels import weighted_sum_backward_kernel, weighted_sum_kernel
from velm_kernels.triton.launches import cdiv, sum_partials

TILE = Config(8, 256, 4, 1)
CONSTANTS = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n}
# Features that one launch goes through: its code grows with their number.
AT_ONCE = 8


def _strides(x: torch.Tensor, regions: int) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.shape[1] == regions else 0


def weighted_sum_forward(features: list[torch.Tensor], weights: torch.Tensor, out: torch.Tensor) -> None:
    batch, regions, dim = out.shape
    count = len(features)
    row_blocks, column_blocks = cdiv(regions, TILE.block_m), cdiv(dim, TILE.block_n)
    sizes = (regions, dim, count, row_blocks, column_blocks)
    before = None
    for first in range(0, count, AT_ONCE):
        some = features[first : first + AT_ONCE]
        is_last = first + AT_ONCE >= count
        to = out if is_last else torch.empty_like(out, dtype=torch.float32)
        strides = tuple(_strides(x, regions) for x in some)
        arguments = (tuple(some), strides, weights[:, first:], before, to, *sizes)
        constants = {"FEATURES": len(some), **CONSTANTS}
        launch("weighted_sum", weighted_sum_kernel, batch * row_blocks * column_blocks, arguments, constants, TILE)
        before = to


def weighted_sum_backward(
    grad: torch.Tensor,
    features: list[torch.Tensor],
    weights: torch.Tensor,
    broadcast: list[bool],
    grad_features: list[torch.Tensor | None],
    grad_weights: torch.Tensor | None,
) -> None:
    known: list[torch.Tensor | None] = list(features) if grad_weights is not None else [None] * len(broadcast)
    everywhere = [i for i, once in enumerate(broadcast) if not once]
    once = [i for i, to in enumerate(grad_features) if broadcast[i] and (grad_weights is not None or to is not None)]
    sums = _through(grad, known, grad_features, weights, grad_weights, everywhere, bool(once))
    if once:
        # The sum of the gradient over the regions is that of a single one.
        _through(sums[:, None], known, grad_features, weights, grad_weights, once, False)


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

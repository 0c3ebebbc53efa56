"""What surrounds the kernels of low_rank_fusion on a GPU: some rows or ranks at a time, and products by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.fusion.inputs import MOST_INPUTS
from velm_kernels.fusion.low_rank_fusion.reference import with_one

# Numbers of projections, or of the gradients of those of one input, that exist at a time, unless those of one row or
# one rank are more.
WORKSPACE = 1 << 24

# From the first of some ranks, their number and for which inputs to the gradients of the projections, for each that
# is there and wanted (rows, ranks * out) or for each row of m one or several to be summed, in the dtype of grad, and to
# the sum for each rank of grad times all projections, float32.
Gradients = Callable[[int, int, list[bool]], tuple[list[Tensor | None], Tensor]]


def forward(of_rows: Callable[..., None], *arguments: Any) -> None:
    """The kernel ``low_rank_fusion_forward`` by ``of_rows``, which first projects inputs with one row for several of
    the result.

    Of these projections, if backward does not want them, no more exist at a time than ``WORKSPACE``.
    """
    *tensors, weight, bias, rows, save, out, kept = arguments
    xs, factors = [x for x in tensors[:MOST_INPUTS] if x is not None], tensors[MOST_INPUTS:]
    entries = min(x.shape[0] for x in xs)
    rank, _, columns = factors[0].shape
    shared = rank * columns * sum(x.shape[0] < rows for x in xs)
    step = entries if save or not shared else max(1, WORKSPACE // shared)
    if step >= entries:
        of_rows(*arguments)
        return
    for first in range(0, entries, step):
        count = min(step, entries - first)
        *some, of_out = [
            None if x is None else x.narrow(0, x.shape[0] // entries * first, x.shape[0] // entries * count)
            for x in (*tensors[:MOST_INPUTS], out)
        ]
        of_rows(*some, *factors, weight, bias, rows // entries * count, save, of_out, kept)


def backward(gradients_of: Gradients, grad: Tensor, *arguments: Any) -> None:
    """The kernel ``low_rank_fusion_backward`` by ``gradients_of`` and the products of what it gives."""
    xs, factors, rows, gradients = arguments[:MOST_INPUTS], arguments[MOST_INPUTS:8], arguments[10], arguments[12:]
    grads_x, grads_factor, (grad_weight, grad_bias) = gradients[:MOST_INPUTS], gradients[MOST_INPUTS:8], gradients[8:]
    rank, _, out = factors[0].shape
    # Sums over ranks.
    sums_x = [
        to if to is None or to.dtype == torch.float32 else torch.empty_like(to, dtype=torch.float32) for to in grads_x
    ]
    sums = grad.new_zeros((rank,), dtype=torch.float32)
    for to in (*sums_x, *grads_factor):
        if to is not None:
            to.zero_()
    wanted = [to_x is not None or to_factor is not None for to_x, to_factor in zip(grads_x, grads_factor, strict=True)]
    step = max(1, WORKSPACE // max(1, rows * out))
    for first in range(0, rank if grad.numel() and (any(wanted) or grad_weight is not None) else 0, step):
        ranks = min(step, rank - first)
        part = slice(first, first + ranks)
        of_projections, sums[part] = gradients_of(first, ranks, wanted)
        for m, gradient in enumerate(of_projections):
            if gradient is None:
                continue
            gradient = _of_rows(gradient, xs[m].shape[0])
            if sums_x[m] is not None:
                # (ranks, dim, out) -> (ranks * out, dim)
                factor = factors[m][part, 1:].transpose(1, 2).flatten(0, 1)
                sums_x[m] += gradient @ factor.to(gradient.dtype)
            if grads_factor[m] is not None:
                # (1 + dim, ranks * out) -> (ranks, 1 + dim, out)
                product = with_one(xs[m].to(gradient.dtype)).t() @ gradient
                grads_factor[m][part] = product.unflatten(1, (ranks, out)).transpose(0, 1)
    for to, value in zip(grads_x, sums_x, strict=True):
        if to is not value:
            to.copy_(value)
    if grad_weight is not None:
        grad_weight.copy_(sums)
    if grad_bias is not None:
        grad_bias.copy_(grad.sum(0, dtype=torch.float32))


def _of_rows(gradient: Tensor, rows: int) -> Tensor:
    """What there is for each row of x, summed; in a type that the device multiplies in float32."""
    repeat = gradient.shape[0] // rows
    dtype = gradient.dtype if gradient.is_cuda else torch.float32
    if repeat == 1:
        return gradient.to(dtype)
    return gradient.unflatten(0, (rows, repeat)).sum(1, dtype=torch.float32).to(dtype)

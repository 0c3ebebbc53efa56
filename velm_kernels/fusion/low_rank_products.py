"""What surrounds the kernels of low_rank_fusion on a GPU: some rows or ranks at a time, and products by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.fusion.reference import with_one

MODALITIES = 4
# Numbers of projections, or of the gradients of those of one modality, that exist at a time, unless those of one row or
# one rank are more.
WORKSPACE = 1 << 24

# From the first of some ranks, their number and for which modalities to the gradients of the projections, for each that
# is there and wanted (rows, ranks * out) or for each row of m one or several to be summed, in the dtype of grad, and to
# the sum for each rank of grad times all projections, float32.
Gradients = Callable[[int, int, list[bool]], tuple[list[Tensor | None], Tensor]]


def split(kept: Tensor, xs: tuple[Tensor | None, ...], factor0: Tensor) -> list[Tensor | None]:
    """The projections of each modality, (rank, rows of m, out)."""
    if kept.numel() == 0:
        return [None] * MODALITIES
    rank, _, out = factor0.shape
    shapes = [(0, 0, 0) if x is None else (rank, x.shape[0], out) for x in xs]
    parts = kept.split([rank * rows * out for rank, rows, out in shapes])
    return [part.view(shape) if part.numel() else None for part, shape in zip(parts, shapes, strict=True)]


def forward(of_rows: Callable[..., tuple[Tensor, Tensor]], *arguments: Any) -> tuple[Tensor, Tensor]:
    """`velm::low_rank_fusion_forward` by ``of_rows``, which first projects inputs with one row for several of z.

    Of these projections, if backward does not want them, no more exist at a time than ``WORKSPACE``.
    """
    *tensors, weight, bias, rows, save = arguments
    xs, factors = [x for x in tensors[:MODALITIES] if x is not None], tensors[MODALITIES:]
    entries = min(x.shape[0] for x in xs)
    rank, _, out = factors[0].shape
    shared = rank * out * sum(x.shape[0] < rows for x in xs)
    step = entries if save or not shared else max(1, WORKSPACE // shared)
    if step >= entries:
        return of_rows(*arguments)
    parts = []
    for first in range(0, entries, step):
        count = min(step, entries - first)
        some = [
            None if x is None else x.narrow(0, x.shape[0] // entries * first, x.shape[0] // entries * count)
            for x in tensors[:MODALITIES]
        ]
        part, kept = of_rows(*some, *factors, weight, bias, rows // entries * count, save)
        parts.append(part)
    return torch.cat(parts), kept


def backward(gradients_of: Gradients, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`velm::low_rank_fusion_backward` by ``gradients_of`` and the products of what it gives."""
    *tensors, _, _, rows, grad_mask = arguments
    xs, factors = tuple(tensors[:MODALITIES]), tuple(tensors[MODALITIES:])
    rank, _, out = factors[0].shape
    wants_x, wants_factor = ([bool(grad_mask >> bit & 1) for bit in range(first, first + 4)] for first in (0, 4))
    grads_x = [
        x.new_zeros(x.shape, dtype=torch.float32) if want and x is not None else grad.new_empty((0,))
        for x, want in zip(xs, wants_x, strict=True)
    ]
    grads_factor = [
        torch.zeros_like(factor) if want and factor is not None else grad.new_empty((0,))
        for factor, want in zip(factors, wants_factor, strict=True)
    ]
    sums = grad.new_zeros((rank,), dtype=torch.float32)
    wanted = [x is not None and (wants_x[m] or wants_factor[m]) for m, x in enumerate(xs)]
    step = max(1, WORKSPACE // max(1, rows * out))
    for first in range(0, rank if grad_mask & 511 and grad.numel() else 0, step):
        ranks = min(step, rank - first)
        part = slice(first, first + ranks)
        gradients, sums[part] = gradients_of(first, ranks, wanted)
        for m, gradient in enumerate(gradients):
            if gradient is None:
                continue
            gradient = _of_rows(gradient, xs[m].shape[0])
            if wants_x[m]:
                # (ranks, dim, out) -> (ranks * out, dim)
                factor = factors[m][part, 1:].transpose(1, 2).flatten(0, 1)
                grads_x[m] += gradient @ factor.to(gradient.dtype)
            if wants_factor[m]:
                # (1 + dim, ranks * out) -> (ranks, 1 + dim, out)
                product = with_one(xs[m].to(gradient.dtype)).t() @ gradient
                grads_factor[m][part] = product.unflatten(1, (ranks, out)).transpose(0, 1)
    return (
        *(g.to(grad.dtype) for g in grads_x),
        *grads_factor,
        sums.to(grad.dtype) if grad_mask & 256 else grad.new_empty((0,)),
        grad.sum(0, dtype=torch.float32).to(grad.dtype) if grad_mask & 512 else grad.new_empty((0,)),
    )


def _of_rows(gradient: Tensor, rows: int) -> Tensor:
    """What there is for each row of x, summed; in a type that the device multiplies in float32."""
    repeat = gradient.shape[0] // rows
    dtype = gradient.dtype if gradient.is_cuda else torch.float32
    if repeat == 1:
        return gradient.to(dtype)
    return gradient.unflatten(0, (rows, repeat)).sum(1, dtype=torch.float32).to(dtype)

"""How tensors lie in memory: what operators do to arguments of any layout before a kernel sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def unit_last_stride(x: Tensor) -> Tensor:
    """``x``, copied if neighbours along its last dimension are not neighbours in memory: what kernels rely on.

    A tensor without elements is contiguous whatever its strides, so that ``Tensor.contiguous`` would leave those of an
    expanded one (the gradient of a sum) at 0.
    """
    if x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def product(sizes: Iterable[int]) -> int:
    """``math.prod``, of numbers that a compiler may know by name only."""
    total = 1
    for size in sizes:
        total = total * size
    return total


def as_matrix(x: Tensor) -> Tensor:
    """``(rows, dim)`` of ``(..., dim)``, neighbours in a row next to each other; also for ``dim`` 0."""
    return unit_last_stride(x if x.dim() == 2 else x.reshape(product(x.shape[:-1]), x.shape[-1]))


def with_regions(inputs: Sequence[Tensor], most_dims: int | None = None) -> list[Tensor]:
    """The inputs, ``(batch, dim)`` with as many dimensions of 1 in between as the others have for regions, unless these
    have more than ``most_dims`` dimensions."""
    dims = max(x.dim() for x in inputs)
    if dims < 3 or (most_dims is not None and dims > most_dims):
        return list(inputs)
    return [x.reshape(x.shape[0], *[1] * (dims - 2), x.shape[1]) if x.dim() == 2 else x for x in inputs]


def leading_dims(inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The leading dimensions of inputs as they are broadcast with one another: those of ``(batch, d)``, where another
    input is ``(batch, regions, d')`` of the same batch, get a 1 for its regions."""
    batches = [x.shape[0] for x in inputs if x.dim() == 3]
    # Not ``in``: a compiler that knows sizes by name only takes that for a question of identity.
    return [
        (*x.shape[:-1], 1) if x.dim() == 2 and any(x.shape[0] == batch for batch in batches) else tuple(x.shape[:-1])
        for x in inputs
    ]


def as_regions(
    x: Tensor, batch: Sequence[int], regions: Sequence[int], own: Sequence[int] | None = None, repeated: bool = False
) -> Tensor:
    """``(batch, regions, dim)`` of a tensor that is broadcast to ``(*batch, *regions, dim)``, neighbours in a row next
    to each other.

    ``(batch, 1, dim)`` where it is the same for all regions, unless ``repeated``: then it is expanded. ``own`` are its
    leading dimensions where they are not those of its shape, see :func:`leading_dims`.
    """
    if own is None and len(batch) == len(regions) == 1 and tuple(x.shape[:-1]) == (*batch, *regions):
        return unit_last_stride(x)
    dim, own = x.shape[-1], tuple(x.shape[:-1] if own is None else own)
    own = (1,) * (len(batch) + len(regions) - len(own)) + own
    count = product(regions)
    if not repeated and count > 1 and all(size == 1 for size in own[len(batch) :]):
        regions, count = own[len(batch) :], 1
    x = x.reshape(*own, dim).expand(*batch, *regions, dim)
    return unit_last_stride(x.reshape(product(batch), count, dim))


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, in the shape and dtype of ``x`` and contiguous: half of the time of ``x.new_empty(x.shape)``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_heads_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised ``(batch, heads, rows, dim)`` whose memory is ``(batch, rows, heads, dim)``: what a module turns
    into ``(batch, rows, heads * dim)`` without a copy. Packed sequences, ``(tokens, heads, dim)``, are so anyway."""
    if len(shape) == 3:
        return like.new_empty(tuple(shape))
    batch, heads, rows, dim = shape
    row = heads * dim
    return like.new_empty_strided((batch, heads, rows, dim), (rows * row, dim, row, 1))


def empty_like_heads(like: Tensor, dim: int) -> Tensor:
    """:func:`empty_heads_last` with the shape of ``like`` but for its last dimension."""
    return empty_heads_last(like, (*like.shape[:-1], dim))

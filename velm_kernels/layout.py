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
    return unit_last_stride(x.reshape(product(x.shape[:-1]), x.shape[-1]))


def empty_heads_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised ``(batch, heads, rows, dim)`` whose memory is ``(batch, rows, heads, dim)``: what a module turns
    into ``(batch, rows, heads * dim)`` without a copy."""
    batch, heads, rows, dim = shape
    return like.new_empty((batch, rows, heads, dim)).transpose(1, 2)

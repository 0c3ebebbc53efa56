"""Count sketches of the rows of two matrices: the operator below compact bilinear pooling, not a public one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.backends import ON_REQUEST, ORDER, cpu, cuda, register, triton
from velm_kernels.backends.library import declare
from velm_kernels.fusion import reference

BACKENDS = ORDER + ON_REQUEST


def _fake(
    x: Tensor, index_x: Tensor, sign_x: Tensor, y: Tensor, index_y: Tensor, sign_y: Tensor, dim: int, backend: str
) -> Tensor:
    return sign_x.new_empty((x.shape[0] + y.shape[0], dim))


# x, y: (rows, features) of one dtype, last stride 1; index: (features,) int32, values from 0 to dim - 1; sign:
# (features,) float32, both contiguous. The result, the sketches of the rows of x and then those of y, is float32 and
# contiguous.
declare(
    "count_sketches",
    "Tensor x, Tensor index_x, Tensor sign_x, Tensor y, Tensor index_y, Tensor sign_y, SymInt dim",
    "Tensor",
    fake=_fake,
)


def by_bucket(index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The features in the order of their buckets, and where in it each bucket begins, ``(dim + 1,)``; int32.

    With these a sketch is gathered: its elements are sums in a fixed order, without atomics."""
    buckets, order = torch.sort(index, stable=True)
    bounds = torch.searchsorted(buckets, torch.arange(dim + 1, dtype=index.dtype, device=index.device), out_int32=True)
    return order.int(), bounds


def _reference(
    x: Tensor, index_x: Tensor, sign_x: Tensor, y: Tensor, index_y: Tensor, sign_y: Tensor, dim: int
) -> Tensor:
    pairs = ((x, index_x, sign_x), (y, index_y, sign_y))
    return torch.cat([reference.count_sketch(v.to(s.dtype), i.long(), s, dim) for v, i, s in pairs])


def _order_and_bounds(args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, index_x, sign_x, y, index_y, sign_y, dim = args
    # Of the features in the order of their buckets, and the bounds behind it.
    pair = [torch.cat(by_bucket(index, dim)) for index in (index_x, index_y)]
    return x, pair[0], sign_x, y, pair[1], sign_y, dim


register("count_sketches", "reference", _reference)
triton.register_triton("count_sketches", "fusion.triton_count_sketch")
cpu.register_cpu("count_sketches")
cuda.register_cuda("count_sketches", prepare=_order_and_bounds)

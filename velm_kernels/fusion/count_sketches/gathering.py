"""What kernels need that gather the sums of buckets, without atomics."""

from __future__ import annotations

import torch
from torch import Tensor


def by_bucket(index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The features in the order of their buckets, and where in it each bucket begins, ``(dim + 1,)``; int32.

    With these a sketch is gathered: its elements are sums in a fixed order, without atomics."""
    buckets, order = torch.sort(index, stable=True)
    bounds = torch.searchsorted(buckets, torch.arange(dim + 1, dtype=index.dtype, device=index.device), out_int32=True)
    return order.int(), bounds

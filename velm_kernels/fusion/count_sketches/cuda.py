"""Count sketches by a CUDA kernel, which gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from velm_kernels.fusion.count_sketches.gathering import by_bucket


def count_sketches_forward(
    kernel: Callable[[str], Callable[..., Any]],
    x: Tensor,
    index_x: Tensor,
    sign_x: Tensor,
    y: Tensor,
    index_y: Tensor,
    sign_y: Tensor,
    dim: int,
    out: Tensor,
) -> None:
    # In place of an index: the features in the order of their buckets, and the bounds behind it.
    order_x, order_y = (torch.cat(by_bucket(index, dim)) for index in (index_x, index_y))
    kernel("count_sketches_forward")(x, order_x, sign_x, y, order_y, sign_y, dim, out)

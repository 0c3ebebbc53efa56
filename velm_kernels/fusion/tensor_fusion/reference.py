"""The written meaning of :func:`velm_kernels.tensor_fusion`, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_fusion(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight ([1; x_1] (x) [1; x_2] (x) ...) + bias``, the outer product formed."""
    outer = _with_one(inputs[0])
    for x in inputs[1:]:
        outer = (outer[..., :, None] * _with_one(x)[..., None, :]).flatten(-2)
    return torch.nn.functional.linear(outer, weight, bias)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones((*x.shape[:-1], 1)), x], -1)

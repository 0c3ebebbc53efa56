"""The written meaning of bilinear, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z[..., k] = sum_ij x[..., i] weight[k, i, j] y[..., j] + bias[k]``."""
    out = torch.einsum("...i,kij,...j->...k", x, weight, y)
    return out if bias is None else out + bias

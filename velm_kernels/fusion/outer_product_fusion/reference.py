"""The written meaning of outer_product_fusion, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def outer_product_fusion(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x y^T``, summed over the regions of ``(batch, regions, d)`` that the mask leaves."""
    if x.dim() == 2:
        return x[:, :, None] * y[:, None, :]
    if mask is not None:
        x, y = (torch.where(mask[..., None], value, 0.0) for value in (x, y))
    return (x[:, :, :, None] * y[:, :, None, :]).sum(1)

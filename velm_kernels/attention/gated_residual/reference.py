"""The written meaning of gated_residual, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """``residual + tanh(gate) * x``; rows of ``x`` with a False ``row_mask`` count as 0."""
    if row_mask is None:
        return residual + torch.tanh(gate) * x
    zero, live = x.new_zeros(()), row_mask[..., None]
    # Of both factors, so that neither meets the other where a row is masked.
    return residual + torch.where(live, torch.tanh(gate), zero) * torch.where(live, x, zero)

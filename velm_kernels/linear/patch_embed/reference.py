"""The written meaning of :func:`velm_kernels.patch_embed`, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def patch_embed(pixels: Tensor, weight: Tensor, bias: Tensor | None = None, layout: str = "tokens") -> Tensor:
    """A convolution whose stride is its kernel; of patches that are rows already a product."""
    patch = tuple(weight.shape[2:])
    if pixels.dim() != weight.dim() or not patch:
        return torch.nn.functional.linear(pixels, weight.flatten(1), bias)
    convolution = getattr(torch.nn.functional, f"conv{len(patch)}d")
    out: Tensor = convolution(pixels, weight, bias, stride=patch)
    return out.flatten(2).transpose(1, 2) if layout == "tokens" else out

"""What launches of every family's Triton kernels share."""

from __future__ import annotations

import torch

from velm_kernels.backends.triton import Config, launch
from velm_kernels.triton.kernels import sum_partials_kernel

# Work is split further where fewer programs than this would run.
FEW_PROGRAMS = 256


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def sum_partials(partials: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Sums float32 (count, elements) over its first dimension, in order, into `total` (contiguous)."""
    block = 128
    arguments = (partials, total, partials.shape[0], total.numel())
    launch(
        "sum_partials",
        sum_partials_kernel,
        cdiv(total.numel(), block),
        arguments,
        {"BLOCK": block},
        Config(block, 0, 4, 1),
    )
    return total

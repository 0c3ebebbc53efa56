"""The written meaning of compact_bilinear, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.fusion.count_sketches.reference import count_sketch


def compact_bilinear(
    x: Tensor, y: Tensor, sketch_x: tuple[Tensor, Tensor], sketch_y: tuple[Tensor, Tensor], dim: int
) -> Tensor:
    """The circular convolution of the count sketches of x and y, through their Fourier transforms."""
    a, b = (torch.fft.rfft(count_sketch(v, i, s.to(v.dtype), dim)) for v, (i, s) in ((x, sketch_x), (y, sketch_y)))
    return torch.fft.irfft(a * b, n=dim)

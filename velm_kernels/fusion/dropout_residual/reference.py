"""The written meaning of dropout_residual, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.philox import philox4x32

BLOCK, COUNTERS = 64, 16


def kept(seed: Tensor, rows: int, dim: int, dropout_p: float) -> Tensor:
    """Bool ``(rows, dim)``: which elements dropout keeps.

    Element ``(r, c)`` takes word ``c % 64 // 16`` of the counter ``(c // 64 * 16 + c % 16, r, r >> 32, 0)`` and is
    dropped if the word is less than ``dropout_p * 2^32``.
    """
    device = seed.device
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    column = torch.arange(dim, dtype=torch.int64, device=device)[None, :]
    counter = column // BLOCK * COUNTERS + column % COUNTERS
    high = row >> 32
    words = philox4x32(seed, torch.broadcast_tensors(counter, row & 0xFFFFFFFF, high, torch.zeros_like(high)))
    word = torch.stack(words).gather(0, (column % BLOCK // COUNTERS).expand(1, rows, dim))[0]
    return word >= int(dropout_p * 2**32)


def dropout_residual(x: Tensor, residual: Tensor | None, seed: Tensor, dropout_p: float) -> Tensor:
    """``residual + dropout(x)`` for ``x (rows, dim)``; all arithmetic in the inputs' dtype."""
    rows, dim = x.shape
    dropped = torch.where(kept(seed, rows, dim, dropout_p), x / (1 - dropout_p), x.new_zeros(()))
    return dropped if residual is None else residual + dropped

"""The written meaning of interpolated_embedding, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.layout import as_matrix
from velm_kernels.pooling.taps import held


def interpolated_embedding(weight: Tensor, positions: Tensor, mode: str, padding: str) -> Tensor:
    """Of a table ``(height, width, dim)`` and positions ``(..., 2)``, (row, column): ``(..., dim)``, the sum over the
    rows and columns around a position of ``k(row - r) * k(column - c) * weight[r, c]`` with the kernel of ``mode``."""
    height, width, _ = weight.shape
    out = torch.zeros(*positions.shape[:-1], weight.shape[2], dtype=weight.dtype, device=weight.device)
    if not height or not width:
        return out + 0 * weight.sum() + 0 * positions.sum()
    reach = 1 if mode == "bilinear" else 2
    sides = [
        held(positions[..., axis], torch.tensor(size - 1, device=weight.device), mode, padding)
        for axis, size in enumerate((height, width))
    ]
    cells = [side.detach().floor().nan_to_num(0.0) for side in sides]
    for row_offset in range(1 - reach, reach + 1):
        for column_offset in range(1 - reach, reach + 1):
            row, column = cells[0] + row_offset, cells[1] + column_offset
            share = _kernel((sides[0] - row).abs(), mode) * _kernel((sides[1] - column).abs(), mode)
            outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
            term = share[..., None] * weight[row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
            out = out + (term if padding == "border" else term.masked_fill(outside[..., None], 0.0))
    return out


def taps(weight: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Of any table of rows ``(..., dim)``: the sum over the last dimension of indices of ``weights * row[indices]``,
    without those whose index is -1."""
    rows = as_matrix(weight)
    if not len(rows):
        return weight.new_zeros(*indices.shape[:-1], weight.shape[-1]) + 0 * weight.sum()
    taken = rows[indices.clamp(min=0)].masked_fill((indices < 0)[..., None], 0.0)
    return (taken * weights.masked_fill(indices < 0, 0.0)[..., None]).sum(-2)


def _kernel(distance: Tensor, mode: str) -> Tensor:
    """Of a distance to a position between two rows: the hat, or the cubic kernel of Keys (1981) with a = -3/4."""
    if mode == "bilinear":
        return (1 - distance).clamp(min=0)
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1
    far = -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3
    return torch.where(distance <= 1, near, far)

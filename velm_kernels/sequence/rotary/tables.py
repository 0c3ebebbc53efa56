"""cos and sin of rotary: of positions and frequencies, and of several axes of positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axis_of_pairs(sections: Sequence[int], axes: int, interleaved: bool, like: Tensor) -> Tensor:
    """``(pairs,)``, which axis the position of each pair comes from. Made where ``like`` is, from nothing that would
    have to be sent there."""
    pair = torch.arange(sum(sections), device=like.device)
    axis = torch.zeros_like(pair)
    if interleaved:
        for n in range(1, axes):
            axis = torch.where((pair % axes == n) & (pair < axes * sections[n]), n, axis)
        return axis
    start = 0
    for n, section in enumerate(sections):
        axis = torch.where(pair >= start, n % axes, axis)
        start += section
    return axis


def columns(pairs: Tensor, layout: str) -> Tensor:
    """``(..., 2 * pairs)`` of ``(..., pairs)``: each at both columns of its pair."""
    if layout == "pairs":
        return pairs.repeat_interleave(2, dim=-1)
    if layout == "quarters":
        first, second = pairs.chunk(2, -1)
        return torch.cat([first, first, second, second], -1)
    return torch.cat([pairs, pairs], -1)


def of_axes(values: Tensor, axis: Tensor) -> Tensor:
    """``(..., n)`` of ``(axes, ..., n)``: the value of the axis that each column has."""
    found = values[0]
    for n in range(1, values.shape[0]):
        found = torch.where(axis == n, values[n], found)
    return found


def of_positions(
    positions: Tensor, inverse_frequencies: Tensor, axis: Tensor | None, layout: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin ``(batch, tokens, rotated)`` in ``dtype`` of ``positions`` (batch, tokens), or with ``axis`` (axes,
    batch, tokens)."""
    positions, frequencies = positions.to(dtype)[..., None], inverse_frequencies.to(dtype)
    angles = (positions if axis is None else of_axes(positions, axis)) * frequencies
    return columns(angles.cos(), layout), columns(angles.sin(), layout)

"""The written meaning of merge_patches, in plain torch."""

from __future__ import annotations

from torch import Tensor

from velm_kernels.pooling.pool_grid.reference import squares


def merge_patches(x: Tensor, height: int, width: int, factor: int, order: str) -> Tensor:
    """Of ``(batch, tokens, dim)``: each square of patches as one, ``(batch, tokens / factor^2, factor^2 * dim)``."""
    return by_windows(x, None, height, width, factor, order == "channels")


def by_windows(x: Tensor, windows: Tensor | None, height: int, width: int, factor: int, channels: bool) -> Tensor:
    """``(batch, rows, factor^2 * dim)``: the tokens of each square one behind the other, or with ``channels`` their
    first features, then their second ones."""
    taken = squares(x, windows, height, width, factor)
    return (taken.transpose(2, 3) if channels else taken).flatten(2)


def apart(merged: Tensor, factor: int, channels: bool) -> Tensor:
    """``(batch, rows, factor^2, dim)`` of what :func:`by_windows` made."""
    batch, rows, features = merged.shape
    count = factor * factor
    if channels:
        return merged.reshape(batch, rows, features // count, count).transpose(2, 3)
    return merged.reshape(batch, rows, count, features // count)

"""The written meaning of pool_grid, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_grid(x: Tensor, height: int, width: int, factor: int, mode: str) -> Tensor:
    """``(batch, tokens, dim)`` as maps, made smaller."""
    if mode == "mean":
        return by_windows(x, None, height, width, factor)
    pixels = x.view(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)
    size = (-(-height // factor), -(-width // factor))
    if not x.numel():
        return x.new_zeros(x.shape[0], size[0] * size[1], x.shape[2]) + 0 * x.sum()
    return F.interpolate(pixels, size, mode="bilinear").flatten(2).transpose(1, 2)


def by_windows(x: Tensor, windows: Tensor | None, height: int, width: int, factor: int) -> Tensor:
    """``(batch, rows, dim)``: the means of squares of ``factor`` x ``factor`` tokens, of a map of height and width, or
    of the squares in ``windows`` (batch, rows, 2): their first tokens, -1 for zeros, and the widths of their maps."""
    return squares(x, windows, height, width, factor).mean(2)


def squares(x: Tensor, windows: Tensor | None, height: int, width: int, factor: int) -> Tensor:
    """``(batch, rows, factor^2, dim)``: the tokens of each square, row by row."""
    batch, tokens, dim = x.shape
    if windows is None:
        rows, columns = height // factor, width // factor
        maps = x.reshape(batch, height, width, dim)[:, : rows * factor, : columns * factor]
        by_square = maps.reshape(batch, rows, factor, columns, factor, dim).transpose(2, 3)
        return by_square.reshape(batch, rows * columns, factor * factor, dim)
    token, live = members(windows, factor)
    # One token more, for squares of none.
    tokens_and_none = torch.cat([x, x.new_zeros(batch, 1, dim)], 1)
    token = torch.where(live, token, tokens).flatten(1)
    taken = tokens_and_none.gather(1, token[..., None].expand(*token.shape, dim))
    return taken.view(batch, windows.shape[1], factor * factor, dim)


def members(windows: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """``(batch, rows, factor^2)``: the numbers of the tokens of each square, and whether it has any."""
    along = torch.arange(factor, device=windows.device)
    offset = along[:, None] * windows[..., 1, None, None] + along
    token = (windows[..., 0, None, None] + offset).flatten(-2).long()
    return token, (windows[..., :1] >= 0).expand(token.shape)

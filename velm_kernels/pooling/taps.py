"""Which rows of a table, and with which weights, make what lies between them."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("bilinear", "bicubic")
PADDINGS = ("border", "zeros")
# What torch.nn.functional.interpolate and grid_sample take of the cubic kernel of Keys (1981), and interpolate with
# antialias as Pillow does.
KEYS, KEYS_ANTIALIAS = -0.75, -0.5


def axis_taps(position: Tensor, size: int | Tensor, mode: str, padding: str) -> tuple[Tensor, Tensor]:
    """Along one axis of ``size`` rows: numbers of rows, int64 ``(*position.shape, 2 or 4)``, -1 for none, and their
    weights, differentiable in ``position``, whose whole numbers are the rows."""
    last = torch.as_tensor(size, device=position.device) - 1
    position = held(position, last, mode, padding)
    floor = position.detach().floor()
    fraction = position - floor
    if mode == "bilinear":
        first, weights = 0, [1 - fraction, fraction]
    else:
        first = -1
        near = [_near(distance, KEYS) for distance in (fraction, 1 - fraction)]
        weights = [_far(1 + fraction, KEYS), *near, _far(2 - fraction, KEYS)]
    offsets = torch.arange(first, first + len(weights), device=position.device)
    row = floor.nan_to_num(0.0).long()[..., None] + offsets
    last = last[..., None] if last.dim() else last
    if padding == "border":
        row = row.clamp(min=0).minimum(last)
    else:
        row = torch.where((row >= 0) & (row <= last), row, -1)
    return row, torch.stack(weights, -1)


def held(position: Tensor, last: Tensor, mode: str, padding: str) -> Tensor:
    """Positions no further outside than it matters: where every tap lies outside, a whole number, so that one tap has
    the weight 1 and the others 0. NaN stays."""
    if padding == "zeros":
        return position.clamp(min=-3.0).minimum((last + 3).to(position.dtype))
    reach = 0 if mode == "bilinear" else 1
    end = (last + reach).to(position.dtype)
    return torch.where(position < -reach, -reach - 1.0, torch.where(position > end, end + 1, position))


def antialias_taps(place: Tensor, out: Tensor, size: int, mode: str, taps: int) -> tuple[Tensor, Tensor]:
    """The taps of ``torch.nn.functional.interpolate(antialias=True)``: of the rows ``place`` among ``out``, made of a
    table of ``size``; as many as ``taps``, those that a row does not need with number -1."""
    scale = size / out.double()
    stretch = scale.clamp(min=1.0)
    support = _support(mode) * stretch
    centre = scale * (place + 0.5)
    first = (centre - support + 0.5).long().clamp(min=0)
    end = (centre + support + 0.5).long().clamp(max=size)
    row = first[..., None] + torch.arange(taps, device=place.device)
    distance = ((row - centre[..., None] + 0.5) / stretch[..., None]).abs()
    if mode == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:
        inner, outer = _near(distance, KEYS_ANTIALIAS), _far(distance, KEYS_ANTIALIAS)
        weights = torch.where(distance < 1, inner, torch.where(distance < 2, outer, 0.0))
    live = row < end[..., None]
    weights = torch.where(live, weights, 0.0)
    return torch.where(live, row, -1), weights / weights.sum(-1, keepdim=True)


def most_antialias_taps(out: int, size: int, mode: str) -> int:
    """How many rows of ``size`` one of ``out`` is made of, at most."""
    return 2 * -int(-_support(mode) * max(size / out, 1.0) // 1) + 1


def crossed(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], width: int | Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens of a map, row by row, and their weights, from those along both axes: every row's tap with
    every column's; -1 where one of the two is."""
    row, column = rows[0][..., :, None], columns[0][..., None, :]
    if isinstance(width, Tensor) and width.dim():
        width = width[..., None, None]
    token = torch.where((row < 0) | (column < 0), -1, row * width + column)
    return token.flatten(-2), (rows[1][..., :, None] * columns[1][..., None, :]).flatten(-2)


def _support(mode: str) -> float:
    return 1.0 if mode == "bilinear" else 2.0


def _near(distance: Tensor, a: float) -> Tensor:
    return ((a + 2) * distance - (a + 3)) * distance * distance + 1


def _far(distance: Tensor, a: float) -> Tensor:
    return ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a

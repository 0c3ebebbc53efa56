"""Fewer tokens: means of squares of neighbours, or a smaller map by interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.operator import Operator
from velm_kernels.pooling.grids import LARGEST, Grids, as_entries, checked_tokens, described_grids, smaller, windows
from velm_kernels.pooling.pool_grid.op import OPERATOR
from velm_kernels.pooling.taps import axis_taps, crossed
from velm_kernels.pooling.weighted_rows import weighted_rows_arguments
from velm_kernels.pooling.weighted_rows.op import OPERATOR as WEIGHTED_ROWS

MODES = ("mean", "bilinear")


def pool_grid(
    x: Tensor,
    height: int | Tensor | Sequence[int],
    width: int | Tensor | Sequence[int],
    factor: int,
    mode: str = "mean",
) -> Tensor:
    """Makes maps of tokens smaller by ``factor`` in height and in width, without a copy of x that has its features
    first.

    With "mean" a token is the mean of a square of ``factor`` x ``factor``: ``torch.nn.AvgPool2d(factor)``, as in Gemma
    3's projector (a factor of 4), Gemma 4's pooler (maps of different sizes with padding; 3) and the videos of
    LLaVA-NeXT. With "bilinear" the map is resized as ``torch.nn.functional.interpolate(mode="bilinear")`` does, without
    antialias, to its sizes divided by ``factor`` and rounded up: the videos of LLaVA-OneVision (Li et al., 2024).

    Args:
        x: ``(..., tokens, dim)``, float32, bfloat16, float16, or float64 (computed by the reference backend); the
            tokens of a map row by row.
        height, width: of every map, in tokens, with ``height * width = tokens``. Or of maps of different sizes
            integers ``(grids,)``, lists or tensors: of maps one behind the other in x ``(tokens, dim)``, or of one map
            in each entry of x ``(batch, tokens, dim)``, whose further tokens are padding. Sizes in tensors must be
            divisible by ``factor``: then the number of tokens of the result needs no number of theirs.
        factor: 1 or more.
        mode: "mean" or "bilinear".

    Returns:
        ``(..., rows, dim)`` in x's dtype, contiguous, computed in float32 and rounded once; a map's new tokens row by
        row. rows is ``(height // factor) * (width // factor)``, for "bilinear" rounded up; of maps one behind the other
        their sum; with padding ``tokens // factor^2`` (more where a listed size rounded up needs more), zeros behind
        the last token of a map.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: sizes do not fit x (those in tensors are looked at on the CPU, or with VELM_CHECK=1).

    What "mean" leaves over of a size that ``factor`` does not divide is not read, nor is padding: their gradient is 0.
    Backward keeps no token.

    Example:
        >>> x = torch.arange(8.0).view(1, 8, 1)  # a map of 2 x 4 tokens of one feature
        >>> velm_kernels.pool_grid(x, height=2, width=4, factor=2)
        tensor([[[2.5000],
                 [4.5000]]])
    """
    arguments, operator, shape = _canonical(x, height, width, factor, mode)
    out: Tensor = operator(arguments)
    return out.view(shape)


def _canonical(x: Any, height: Any, width: Any, factor: Any, mode: str) -> tuple[Arguments, Operator, tuple[int, ...]]:
    checked_tokens(x)
    checks.integer("factor", factor, 1, 2**15)
    checks.choice("mode", mode, MODES)
    given = {"height": height, "width": width}
    if any(isinstance(size, (Tensor, Sequence)) and not isinstance(size, str) for size in given.values()):
        return _of_grids(x, described_grids(x, height, width, factor, ("height", "width")), factor, mode)
    for name, size in given.items():
        checks.integer(name, size, 0, LARGEST)
    if x.shape[-2] != height * width:
        raise ValueError(f"x: expected (..., {height} * {width} = {height * width}, dim), given {tuple(x.shape)}")
    entries, leading, dim = as_entries("x", x), tuple(x.shape[:-2]), x.shape[-1]
    if mode == "mean":
        given = {"x": entries, "windows": None, "height": height, "width": width, "factor": factor}
        return given, OPERATOR, (*leading, (height // factor) * (width // factor), dim)
    rows, columns = smaller(height, factor, True), smaller(width, factor, True)
    down, across = _along(rows, height, x), _along(columns, width, x)
    index, weight = crossed((down[0][:, None], down[1][:, None]), (across[0][None], across[1][None]), width)
    given = weighted_rows_arguments(entries, index.flatten(0, 1), weight.flatten(0, 1))
    return given, WEIGHTED_ROWS, (*leading, rows * columns, dim)


def _along(out: int, size: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The taps of ``out`` tokens along an axis of ``size``."""
    return _taps(torch.arange(out, device=x.device), out, size)


def _taps(place: Tensor, out: Any, size: Any) -> tuple[Tensor, Tensor]:
    return axis_taps((place.double() + 0.5) * size / out - 0.5, size, "bilinear", "border")


def _of_grids(x: Tensor, grids: Grids, factor: int, mode: str) -> tuple[Arguments, Operator, tuple[int, ...]]:
    entries = x[None] if grids.packed else x
    batch, tokens, dim = entries.shape
    if mode == "mean":
        found = windows(grids, factor)
        arguments = {"x": as_entries("x", entries), "windows": found, "height": 0, "width": 0, "factor": factor}
        return arguments, OPERATOR, (*x.shape[:-2], found.shape[1], dim)
    grid, start, row, column = grids.places(factor, up=True)
    rows = grid.shape[1]
    if grids.height.shape[0] == 0:
        index, weight = grid[..., None], torch.zeros_like(grid[..., None], dtype=torch.float32)
    else:
        heights, widths = grids.height[grid.clamp(min=0)], grids.width[grid.clamp(min=0)]
        down = _taps(row, smaller(heights, factor, True), heights)
        across = _taps(column, smaller(widths, factor, True), widths)
        index, weight = crossed(down, across, widths)
        if not grids.packed:
            start = start + torch.arange(batch, device=x.device)[:, None] * tokens
        index = torch.where((grid < 0)[..., None], -1, start[..., None] + index)
    flat = entries.reshape(1, batch * tokens, dim)
    arguments = weighted_rows_arguments(flat, index.flatten(0, 1), weight.flatten(0, 1))
    return arguments, WEIGHTED_ROWS, (*x.shape[:-2], rows, dim)


def canonical(
    x: Tensor,
    height: int | Tensor | Sequence[int],
    width: int | Tensor | Sequence[int],
    factor: int,
    mode: str = "mean",
) -> Arguments:
    return _canonical(x, height, width, factor, mode)[0]


OPERATOR.serves("pool_grid", canonical, None, lambda arguments: OPERATOR if "windows" in arguments else WEIGHTED_ROWS)

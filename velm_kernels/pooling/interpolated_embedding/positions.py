"""Where the tokens of pictures lie in a table of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.pooling.grids import LARGEST, listed_grids
from velm_kernels.pooling.taps import MODES, antialias_taps, axis_taps, crossed, most_antialias_taps

GridSizes = Tensor | Sequence[Sequence[int]]


def grid_positions(
    grid_sizes: GridSizes,
    table_size: int | tuple[int, int],
    *,
    align_corners: bool = False,
    merge: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where the tokens of maps of any sizes lie in a table that is stretched over each of them: the positions of
    :func:`velm_kernels.interpolated_embedding`.

    Args:
        grid_sizes: (height, width) of each map, or (frames, height, width) of each video, whose frames all have the
            same positions: integers ``(grids, 2)`` or ``(grids, 3)``, or a list. A tensor is read: one on a GPU is
            waited for.
        table_size: (height, width) of the table, or one number for both.
        align_corners: whether the first and last tokens lie in the middle of the first and last rows of the table
            (Qwen3-VL), or outer edges on outer edges, half a pixel further out (Kimi, PaddleOCR-VL, SigLIP 2, GLM-4V):
            as in ``torch.nn.functional.interpolate``.
        merge: tokens come in squares of ``merge`` x ``merge``, as Qwen-VL's processors order them; 1 is row by row.
        device: of the result, by default that of grid_sizes.

    Returns:
        float32 ``(tokens, 2)``: (row, column) of each token of each map, in rows and columns of the table.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is negative, or no multiple of ``merge``.

    Example:
        >>> velm_kernels.grid_positions([(1, 4)], table_size=8, align_corners=True)[:, 1]
        tensor([0.0000, 2.3333, 4.6667, 7.0000])
    """
    grids, table, device = _checked(grid_sizes, table_size, align_corners, merge, device)
    found = [torch.zeros(0, 2, device=device)]
    for frames, *sizes in grids:
        rows, columns = (
            _centres(size, of, align_corners, device).float() for size, of in zip(sizes, table, strict=True)
        )
        found.append(_in_order(torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1), frames, merge))
    return torch.cat(found)


def resize_taps(
    grid_sizes: GridSizes,
    table_size: int | tuple[int, int],
    mode: str = "bilinear",
    *,
    align_corners: bool = False,
    antialias: bool = False,
    merge: int = 1,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of a table, with their weights, that ``torch.nn.functional.interpolate`` makes each token of maps of any
    sizes of: what :func:`velm_kernels.interpolated_embedding` takes in place of positions.

    Worth keeping where maps of the same sizes come again, and the way to ``antialias=True`` (SigLIP 2, DINOv2 with
    registers), where a map that is smaller than the table is made of more rows.

    Args:
        grid_sizes, table_size, align_corners, merge, device: as in :func:`velm_kernels.grid_positions`.
        mode: "bilinear" or "bicubic" (the kernel of Keys, 1981, with a = -3/4, or -1/2 with antialias).
        antialias: whether the kernel is stretched where a map is smaller than the table; without ``align_corners``.

    Returns:
        ``(indices, weights)``, int32 and float32 ``(tokens, taps)``: numbers of rows of the table row by row, -1 for
        none, and their weights; taps is 4 or 16, with antialias as many as the most that one token needs.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a size is negative, or no multiple of ``merge``; ``align_corners`` with ``antialias``.

    Example:
        >>> indices, weights = velm_kernels.resize_taps([(1, 2)], table_size=(1, 4), antialias=True)
        >>> table = torch.tensor([[0.0], [0.0], [7.0], [7.0]])
        >>> velm_kernels.interpolated_embedding(table, (indices, weights))
        tensor([[1.],
                [6.]])
    """
    grids, table, device = _checked(grid_sizes, table_size, align_corners, merge, device)
    checks.choice("mode", mode, MODES)
    if checks.flag("antialias", antialias) and align_corners:
        raise ValueError("align_corners: expected False with antialias, given True")
    along = [
        max((most_antialias_taps(max(sizes[axis], 1), table[axis - 1], mode) for sizes in grids), default=1)
        for axis in (1, 2)
    ]
    taps = along[0] * along[1] if antialias else 4 if mode == "bilinear" else 16
    indices = [torch.zeros(0, taps, dtype=torch.int32, device=device)]
    weights = [torch.zeros(0, taps, device=device)]
    for frames, *sizes in grids:
        axes = []
        for size, of, count in zip(sizes, table, along, strict=True):
            if antialias:
                place = torch.arange(size, device=device)
                axes.append(antialias_taps(place, torch.tensor(max(size, 1), device=device), of, mode, count))
            else:
                axes.append(axis_taps(_centres(size, of, align_corners, device), of, mode, "border"))
        (rows, of_rows), (columns, of_columns) = axes
        index, weight = crossed((rows[:, None], of_rows[:, None]), (columns[None], of_columns[None]), table[1])
        indices.append(_in_order(index.int(), frames, merge))
        weights.append(_in_order(weight.float(), frames, merge))
    return torch.cat(indices), torch.cat(weights)


def _centres(size: int, of: int, align_corners: bool, device: Any) -> Tensor:
    """Where ``size`` tokens lie along a table of ``of`` rows, float64."""
    place = torch.arange(size, dtype=torch.float64, device=device)
    return place * (of - 1) / max(size - 1, 1) if align_corners else (place + 0.5) * of / max(size, 1) - 0.5


def _in_order(values: Tensor, frames: int, merge: int) -> Tensor:
    """``(frames * height * width, n)`` of ``(height, width, n)``, in squares of ``merge``."""
    height, width, n = values.shape
    squares = values.view(height // merge, merge, width // merge, merge, n).transpose(1, 2)
    return squares.reshape(height * width, n).repeat(frames, 1)


def _checked(
    grid_sizes: GridSizes, table_size: Any, align_corners: bool, merge: int, device: Any
) -> tuple[list[tuple[int, int, int]], tuple[int, int], Any]:
    grids = listed_grids("grid_sizes", grid_sizes)
    pair = table_size if isinstance(table_size, tuple) else (table_size, table_size)
    if len(pair) != 2:
        raise TypeError(f"table_size: expected (height, width) or one number, given {checks.describe(table_size)}")
    table = tuple(checks.integer("table_size", size, 1, LARGEST) for size in pair)
    checks.flag("align_corners", align_corners)
    checks.integer("merge", merge, 1, LARGEST)
    for place, sizes in enumerate(grids):
        if sizes[1] % merge or sizes[2] % merge:
            raise ValueError(f"grid_sizes[{place}]: expected multiples of merge = {merge}, given {sizes[1:]}")
    if device is None and isinstance(grid_sizes, Tensor):
        device = grid_sizes.device
    return grids, (table[0], table[1]), device

"""Rows of a table at positions between its rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.layout import as_matrix
from velm_kernels.pooling.interpolated_embedding.positions import grid_positions, resize_taps
from velm_kernels.pooling.taps import MODES, PADDINGS, axis_taps, crossed
from velm_kernels.pooling.weighted_rows import weighted_rows_arguments
from velm_kernels.pooling.weighted_rows.op import OPERATOR

__all__ = ["grid_positions", "interpolated_embedding", "resize_taps"]


def interpolated_embedding(
    weight: Tensor,
    positions: Tensor | tuple[Tensor, Tensor],
    mode: str = "bilinear",
    *,
    padding: str = "border",
) -> Tensor:
    """Interpolates a table of embeddings at any positions: ``out[n] = sum over taps of w * weight[row, column]``, in
    one pass, where ``(weight[index] * w[..., None]).sum(1)`` first writes 4 or 16 rows for each position.

    This is how vision towers that take pictures of any size stretch a learned table of positions over them: Qwen3-VL,
    Qwen3.5 and PaddleOCR-VL (bilinear), MoonViT in Kimi-VL (bicubic), GLM-4V's ``grid_sample`` (bicubic), SigLIP 2
    (bilinear with antialias). :func:`velm_kernels.grid_positions` has positions for the sizes of pictures,
    :func:`velm_kernels.resize_taps` those of ``torch.nn.functional.interpolate`` with antialias.

    Args:
        weight: the table, ``(height, width, dim)``, or ``(side * side, dim)`` of a square one; float32, bfloat16,
            float16, or float64 (computed by the reference backend). Beside taps any number of rows, ``(..., dim)``.
        positions: floating point ``(..., 2)``: (row, column), whole numbers in the middle of a row of the table,
            anywhere, computed with in float32; the x of ``grid_sample`` without align_corners is the column
            ``((x + 1) * width - 1) / 2``. Or taps: a pair ``(indices, weights)`` of integers and floating-point numbers
            ``(..., taps)``: the rows of the table and their weights; -1 is no row.
        mode: "bilinear", 4 rows, or "bicubic", 16 rows by the kernel of Keys (1981) with a = -3/4, as torch takes it.
            Not looked at beside taps.
        padding: "border": what lies outside is like the nearest row and column inside, as in interpolate; "zeros":
            there is 0 outside, as in ``grid_sample(padding_mode="zeros")``.

    Returns:
        ``(..., dim)`` in the dtype of weight, contiguous, computed in float32 and rounded once.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape or device is not as above, or (on the CPU, or with VELM_CHECK=1) an index is no row of the
            table. On a GPU, where nothing waits for them, such a row is 0.

    Gradients flow to weight, to positions (of the interpolated surface; 0 along an axis on which a position lies
    outside beside a border) and to the weights of taps. That of the table is summed over the positions that read a row,
    in their order: the same bits each time, where ``embedding`` on a GPU adds by atomics.

    Example:
        >>> table = torch.tensor([[0.0], [2.0], [4.0], [10.0]])  # 2 rows and 2 columns of one feature
        >>> velm_kernels.interpolated_embedding(table, torch.tensor([[0.0, 0.5], [0.5, 0.5], [1.0, 9.0]]))
        tensor([[ 1.],
                [ 4.],
                [10.]])
    """
    arguments, shape = _canonical(weight, positions, mode, padding)
    out: Tensor = OPERATOR(arguments)
    return out.view(shape)


def canonical(
    weight: Tensor, positions: Tensor | tuple[Tensor, Tensor], mode: str = "bilinear", *, padding: str = "border"
) -> Arguments:
    return _canonical(weight, positions, mode, padding)[0]


def _canonical(weight: Any, positions: Any, mode: str, padding: str) -> tuple[Arguments, tuple[int, ...]]:
    checks.dtype_in("weight", checks.tensor("weight", weight), checks.FLOAT_DTYPES)
    checks.choice("mode", mode, MODES)
    checks.choice("padding", padding, PADDINGS)
    if isinstance(positions, (tuple, list)):
        indices, weights = _checked_taps(weight, positions)
    else:
        indices, weights = _taps_at(weight, positions, mode, padding)
    leading, taps = tuple(indices.shape[:-1]), indices.shape[-1]
    count = 1
    for size in leading:
        count = count * size
    table = as_matrix(weight)[None]
    arguments = weighted_rows_arguments(table, indices.reshape(count, taps), weights.reshape(count, taps))
    return arguments, (*leading, weight.shape[-1])


def _checked_taps(weight: Tensor, taps: Any) -> tuple[Tensor, Tensor]:
    if len(taps) != 2:
        raise TypeError(f"positions: expected a tensor or a pair (indices, weights), given {checks.describe(taps)}")
    indices, weights = taps
    if weight.dim() < 2:
        raise ValueError(f"weight: expected (..., dim) with rows, given {tuple(weight.shape)}")
    checks.dtype_in("positions[0]", checks.tensor("positions[0]", indices), checks.INTEGER_DTYPES)
    if indices.dim() < 1:
        raise ValueError(f"positions[0]: expected (..., taps), given {tuple(indices.shape)}")
    checks.dtype_in("positions[1]", checks.tensor("positions[1]", weights), checks.FLOAT_DTYPES)
    checks.shape("positions[1]", weights, "the shape of positions[0]", indices.shape)
    for place, value in enumerate((indices, weights)):
        checks.same_device(f"positions[{place}]", value, "weight", weight)
    rows = 1
    for size in weight.shape[:-1]:
        rows = rows * size
    checks.values_between("positions[0]", indices, -1, rows - 1)
    return checks.as_int32(indices), weights


def _taps_at(weight: Tensor, positions: Any, mode: str, padding: str) -> tuple[Tensor, Tensor]:
    if not isinstance(positions, Tensor):
        raise TypeError(
            f"positions: expected a tensor or a pair (indices, weights), given {checks.describe(positions)}"
        )
    checks.dtype_in("positions", checks.tensor("positions", positions), checks.FLOAT_DTYPES)
    if positions.dim() < 1 or positions.shape[-1] != 2:
        raise ValueError(f"positions: expected (..., 2), given {tuple(positions.shape)}")
    checks.same_device("positions", positions, "weight", weight)
    if weight.dim() == 3:
        height, width = weight.shape[:2]
    else:
        height = width = math.isqrt(weight.shape[0]) if weight.dim() == 2 else -1
        if weight.dim() != 2 or height * width != weight.shape[0]:
            raise ValueError(
                f"weight: expected (height, width, dim), or (side * side, dim), given {tuple(weight.shape)}"
            )
    positions = positions.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    rows = axis_taps(positions[..., 0], height, mode, padding)
    return crossed(rows, axis_taps(positions[..., 1], width, mode, padding), width)


OPERATOR.serves("interpolated_embedding", canonical)

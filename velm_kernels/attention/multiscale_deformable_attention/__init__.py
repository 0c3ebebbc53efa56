"""Attention at a few sampled places of feature maps of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.attention.multiscale_deformable_attention.op import OPERATOR
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride


def multiscale_deformable_attention(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sums feature maps at a few places for each query: ``out[q, h] = sum over levels and points of weight *
    bilinear(value of the level and head h, location)``, equation 3 of Deformable DETR (Zhu et al., 2021). In one pass,
    without the samples in memory.

    A location ``(x, y)`` is ``(0, 0)`` at the outer corner of a level's first token and ``(1, 1)`` at that of its last
    one; the middle of the token in row i and column j lies at ``((j + 0.5) / width, (i + 0.5) / height)``. Around a
    level there are zeros: ``torch.nn.functional.grid_sample(mode="bilinear", padding_mode="zeros",
    align_corners=False)``, as Deformable DETR, Grounding DINO, Mask2Former, RT-DETR and their relatives call it.

    Args:
        value: ``(batch, tokens, heads, d)``, the tokens of all levels one level after the other, each by rows; float32,
            bfloat16, float16, or float64 (computed by the reference backend).
        spatial_shapes: (height, width) of each level, ``(levels, 2)`` integers, or a list of pairs. On a GPU a tensor
            there is read where it lies; a list is copied there.
        sampling_locations: ``(batch, queries, heads, levels, points, 2)``, x first, floating point. Anywhere: what lies
            outside reads zeros.
        attention_weights: ``(batch, queries, heads, levels, points)``, floating point, most often with sum 1 over
            levels and points.

    Returns:
        ``(batch, queries, heads * d)`` in the dtype of value, contiguous, computed in float32 and rounded once.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or the levels have not as many tokens as value (a tensor's
            numbers are looked at on the CPU, or with VELM_CHECK=1; on a GPU nothing waits for them).

    Gradients flow to value, sampling_locations and attention_weights, and backward keeps these alone. The gradient of a
    location is that of the bilinear surface to its right and below where it lies on an edge of it. A location that is
    NaN or infinite makes NaN.

    Example:
        >>> value = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]).view(1, 5, 1, 1)  # a level of 2 * 2 tokens, one of 1 * 1
        >>> locations = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).view(1, 1, 1, 2, 1, 2)
        >>> weights = torch.tensor([1.0, 0.5]).view(1, 1, 1, 2, 1)
        >>> velm_kernels.multiscale_deformable_attention(value, [(2, 2), (1, 1)], locations, weights)
        tensor([[[7.5000]]])
    """
    out: Tensor = OPERATOR(canonical(value, spatial_shapes, sampling_locations, attention_weights))
    return out


def canonical(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Arguments:
    """Checks the arguments of :func:`multiscale_deformable_attention` and returns those of the operator."""
    checks.dtype_in(
        "value", checks.tensor("value", value, dims=4, layout="(batch, tokens, heads, d)"), checks.FLOAT_DTYPES
    )
    batch, _, heads, _ = value.shape
    shapes = _checked_shapes(spatial_shapes, value)
    levels = shapes.shape[0]
    layout = "(batch, queries, heads, levels, points, 2)"
    checks.tensor("sampling_locations", sampling_locations, dims=6, layout=layout)
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    sizes = (batch, queries, heads, levels, points)
    checks.shape("sampling_locations", sampling_locations, layout, (*sizes, 2))
    checks.shape(
        "attention_weights", checks.tensor("attention_weights", attention_weights), layout.replace(", 2)", ")"), sizes
    )
    given = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    for name, x in given.items():
        checks.dtype_in(name, x, checks.FLOAT_DTYPES)
        checks.same_device(name, x, "value", value)
        if torch.float64 in (value.dtype, x.dtype):
            x = x.to(value.dtype)
        given[name] = x.contiguous()
    return {"value": unit_last_stride(value), "spatial_shapes": shapes, **given}


def _checked_shapes(spatial_shapes: Any, value: Tensor) -> Tensor:
    """``(levels, 2)`` int64 on the device of value."""
    described = "(levels, 2)"
    if isinstance(spatial_shapes, Tensor):
        checks.dtype_in("spatial_shapes", spatial_shapes, checks.INTEGER_DTYPES)
        checks.tensor("spatial_shapes", spatial_shapes, dims=2, layout=described)
        checks.same_device("spatial_shapes", spatial_shapes, "value", value)
        checks.shape("spatial_shapes", spatial_shapes, described, (spatial_shapes.shape[0], 2))
        return spatial_shapes.long().contiguous()
    if not isinstance(spatial_shapes, Sequence) or isinstance(spatial_shapes, str):
        raise TypeError(
            f"spatial_shapes: expected a tensor or a list of (height, width), given {checks.describe(spatial_shapes)}"
        )
    total = 0
    for place, pair in enumerate(spatial_shapes):
        name = f"spatial_shapes[{place}]"
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"{name}: expected a pair (height, width), given {checks.describe(pair)}")
        height, width = (checks.integer(name, size, 0) for size in pair)
        total = total + height * width
    if total != value.shape[1]:
        raise ValueError(
            f"spatial_shapes: expected (height, width) of levels with {value.shape[1]} tokens together, as value has, "
            f"given {' + '.join(f'{height} * {width}' for height, width in spatial_shapes) or 'none'}"
        )
    return torch.tensor([list(pair) for pair in spatial_shapes], dtype=torch.int64, device=value.device).view(-1, 2)


OPERATOR.serves("multiscale_deformable_attention", canonical)

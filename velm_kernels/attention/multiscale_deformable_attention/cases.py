"""What multiscale_deformable_attention is tried with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velm_kernels.attention.multiscale_deformable_attention import reference
from velm_kernels.cases import Arguments, Case, Draw

SIZES = {"batch": 2, "queries": 4, "heads": 2, "points": 2, "height": 3, "width": 5, "d": 12}
LARGER = {"batch": 2, "queries": 75, "heads": 3, "points": 4, "height": 16, "width": 11, "d": 41}
# Of 800 x 1066 pixels: the encoder of Deformable DETR and Grounding DINO, where each token is a query, and its decoder.
ENCODER = {"batch": 1, "queries": 17821, "heads": 8, "points": 4, "height": 100, "width": 134, "d": 32}
DECODER = ENCODER | {"queries": 900}


def _pyramid(height: int, width: int) -> list[tuple[int, int]]:
    """Four levels, each of half the size of the one before it, rounded up."""
    return [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]


def _sampled(
    draw: Draw, batch: int, queries: int, heads: int, points: int, height: int, width: int, d: int
) -> Arguments:
    """Coordinates of which about a fifth lie outside."""
    shapes = _pyramid(height, width)
    tokens = sum(rows * columns for rows, columns in shapes)
    return {
        "value": draw(batch, tokens, heads, d),
        "spatial_shapes": torch.tensor(shapes),
        "sampling_locations": 0.4 * draw(batch, queries, heads, len(shapes), points, 2) + 0.5,
        "attention_weights": draw(batch, queries, heads, len(shapes), points).softmax(-1),
    }


def _listed(draw: Draw, **sizes: int) -> Arguments:
    """Levels as a list, locations and weights in float32 at least, as autocast leaves them."""
    given = _sampled(draw, **sizes)
    wide = torch.promote_types(given["value"].dtype, torch.float32)
    given |= {name: given[name].to(wide) for name in ("sampling_locations", "attention_weights")}
    return given | {"spatial_shapes": [tuple(pair) for pair in given["spatial_shapes"].tolist()]}


def _meaning(value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    shapes = torch.as_tensor(spatial_shapes, device=value.device)
    return reference.multiscale_deformable_attention(value, shapes, sampling_locations, attention_weights)


CASES = [
    Case(
        "multiscale_deformable_attention",
        "",
        _sampled,
        _meaning,
        ("value", "sampling_locations", "attention_weights"),
        SIZES,
        LARGER,
        published={"deformable-encoder": ENCODER, "deformable-decoder": DECODER},
        scaled=("value", "attention_weights"),
    ),
    Case(
        "multiscale_deformable_attention",
        "listed",
        _listed,
        _meaning,
        ("value", "sampling_locations", "attention_weights"),
        SIZES,
        LARGER,
        scaled=("value", "attention_weights"),
        numbers_only=True,
    ),
]

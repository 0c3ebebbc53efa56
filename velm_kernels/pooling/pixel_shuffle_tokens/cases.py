"""What pixel_shuffle_tokens is tried with."""

from __future__ import annotations

import torch
from torch import Tensor

from velm_kernels.cases import Arguments, Case, Draw


def _projected(draw: Draw, batch: int, rows: int, dim: int, out: int) -> Arguments:
    arguments = {"x": draw(batch, 4 * rows * rows, dim), "height": 2 * rows, "width": 2 * rows, "factor": 2}
    return arguments | {"weight": draw(out, 4 * dim), "bias": draw(out)}


def _meaning(x: Tensor, height: int, width: int, factor: int, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, dim = x.shape
    pixels = x.view(batch, height // factor, factor, width // factor, factor, dim).permute(0, 1, 3, 2, 4, 5)
    squares = pixels.reshape(batch, height * width // factor**2, factor**2 * dim)
    return torch.nn.functional.linear(squares, weight, bias)


CASES = [
    Case(
        "pixel_shuffle_tokens",
        "",
        _projected,
        _meaning,
        ("x", "weight", "bias"),
        sizes={"batch": 2, "rows": 3, "dim": 4, "out": 8},
        larger={"batch": 3, "rows": 6, "dim": 30, "out": 90},
        not_zero=("rows",),
    )
]

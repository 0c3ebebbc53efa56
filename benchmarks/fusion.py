"""Operators that join two modalities, at the sizes of their papers and at those of current models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Inputs


def _bilinear(name: str, batch: int, dx: int, dy: int, out: int, regions: int = 0) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            "x": randn(batch, dx),
            "y": randn(batch, regions, dy) if regions else randn(batch, dy),
            "weight": randn(out, dx, dy) * (dx * dy) ** -0.5,
            "bias": randn(out),
        }

    def repeated(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.bilinear(x[:, None].expand(-1, regions, -1) if regions else x, y, weight, bias)

    def outer(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x[:, None] if regions else x
        return F.linear((x[..., :, None] * y[..., None, :]).flatten(-2), weight.flatten(1), bias)

    if regions:
        product = 2.0 * batch * out * dy * (dx + regions)
    else:
        product = 2.0 * batch * out * dx * dy
    rows = batch * max(1, regions)
    traffic = float(out * dx * dy + rows * (dy + out) + batch * dx)
    return Case(
        operator="bilinear",
        name=name,
        shape=f"{batch}{f' x {regions}' if regions else ''} rows, {dx} x {dy} -> {out}",
        make=make,
        wanted=("x", "y", "weight", "bias"),
        ways={"eager": repeated, "peer": outer, "velm": velm_kernels.bilinear},
        flops=product,
        traffic=traffic,
        backward_flops=2 * product,
        backward_traffic=2 * traffic,
        work=float(rows * out * dx),
    )


def cases() -> list[Case]:
    return [
        _bilinear("bilinear", 64, 512, 512, 256),
        _bilinear("bilinear-small", 256, 33, 129, 128),
        _bilinear("bilinear-regions", 16, 256, 256, 128, regions=36),
    ]

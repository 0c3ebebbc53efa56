"""Projections with what follows them, at the sizes of transformer layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Inputs, published


def linear_case(
    name: str, rows: int, in_features: int, out_features: int, activation: str | None, residual: bool
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs: Inputs = {
            "x": randn(rows, in_features),
            # as initialised: outputs are of the size of inputs
            "weight": randn(out_features, in_features, scale=in_features**-0.5),
            "bias": randn(out_features),
        }
        return inputs | ({"residual": randn(rows, out_features)} if residual else {})

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.linear(x, weight, bias)
        if activation is not None:
            out = F.gelu(out)
        return out if residual is None else out + residual

    def velm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return velm_kernels.linear(x, weight, bias, activation, residual)

    product = 2.0 * rows * in_features * out_features
    traffic = float(rows * (in_features + (1 + residual) * out_features) + in_features * out_features)
    return Case(
        operator="linear",
        name=name,
        shape=f"{rows} x {in_features} -> {out_features}{', gelu' * bool(activation)}{', residual' * residual}",
        make=make,
        wanted=("x", "weight", "bias", "residual") if residual else ("x", "weight", "bias"),
        ways={"eager": eager, "velm": velm},
        flops=product,
        traffic=traffic,
        backward_flops=2 * product,
        backward_traffic=2 * traffic,
        work=float(rows * out_features),
    )


def cases() -> list[Case]:
    """At the sizes of the operator's own cases."""

    def case(name: str, activation: str | None = None, residual: bool = False) -> Case:
        size = published()[name]
        return linear_case(name, size["batch"] * size["rows"], size["features"], size["out"], activation, residual)

    return [
        case("feed-forward-in", activation="gelu"),
        case("feed-forward-out", residual=True),
        case("projection"),
        case("few-rows"),
    ]

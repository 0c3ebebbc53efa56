"""Projections with what follows them, at the sizes of transformer layers, and embeddings of patches."""

from __future__ import annotations

import math

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


def patch_case(name: str, pixels: tuple[int, ...], patch: tuple[int, ...], channels: int, embed: int) -> Case:
    """``pixels``: of pictures, or of patches that are rows."""
    features = channels * math.prod(patch)
    is_rows = len(pixels) == 2
    tokens = pixels[0] if is_rows else pixels[0] * math.prod(pixels[2:]) // math.prod(patch)
    convolution = F.conv3d if len(patch) == 3 else F.conv2d

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            "pixels": randn(*pixels),
            "weight": features**-0.5 * randn(embed, channels, *patch),
            "bias": randn(embed),
        }

    def eager(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As transformers has it."""
        if is_rows:
            return convolution(pixels.view(-1, channels, *patch), weight, bias, stride=patch).view(-1, embed)
        return convolution(pixels, weight, bias, stride=patch).flatten(2).transpose(1, 2).contiguous()

    product = 2.0 * tokens * features * embed
    traffic = float(tokens * (features + embed) + features * embed)
    return Case(
        operator="patch_embed",
        name=name,
        shape=f"{'x'.join(map(str, pixels))}, patches of {'x'.join(map(str, patch))} -> {embed}",
        make=make,
        # Pixels have no gradient in training.
        wanted=("weight", "bias"),
        ways={"eager": eager, "velm": velm_kernels.patch_embed},
        flops=product,
        traffic=traffic,
        backward_flops=product,
        backward_traffic=traffic,
        work=float(tokens * max(features, embed)),
    )


def _patches(name: str) -> Case:
    size = published()[name]
    channels, patch, embed = size["channels"], size["patch"], size["embed"]
    if "tokens" in size:
        kernel = (2, patch, patch)
        rows = (size["batch"] * size["tokens"], channels * math.prod(kernel))
        return patch_case(name, rows, kernel, channels, embed)
    picture = (size["batch"], channels, size["rows"] * patch, size["columns"] * patch)
    return patch_case(name, picture, (patch, patch), channels, embed)


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
        _patches("patches-clip"),
        _patches("patches-siglip"),
        _patches("patches-qwen2-vl"),
    ]

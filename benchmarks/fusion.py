"""Operators that join two modalities, at the sizes of their papers and at those of current models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Inputs, published
from velm_kernels.fusion.dropout_residual.reference import dropout_residual


def bilinear_case(name: str, batch: int, dx: int, dy: int, out: int, regions: int = 0) -> Case:
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


def factorized_case(name: str, rows: int, factor: int, dim: int, layout: str, normalized: bool) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        # Sums that do not cancel: their roots would be inexact in any arithmetic.
        return {
            name: torch.randn((rows, factor * dim), generator=generator, dtype=torch.float64).abs() + 0.1
            for name in ("a", "b")
        }

    def eager(a: Tensor, b: Tensor) -> Tensor:
        product = a * b
        z = product.view(rows, dim, factor).sum(2) if layout == "inner" else product.view(rows, factor, dim).sum(1)
        if normalized:
            z = torch.sqrt(F.relu(z)) - torch.sqrt(F.relu(-z))
            z = F.normalize(z, p=2)
        return z

    def velm(a: Tensor, b: Tensor) -> Tensor:
        return velm_kernels.factorized_pool(a, b, factor, layout, normalized, normalized)

    size = float(rows * factor * dim)
    return Case(
        operator="factorized_pool",
        name=name,
        shape=f"{rows} rows, {factor} x {dim}, {layout}{', root and norm' * normalized}",
        make=make,
        wanted=("a", "b"),
        ways={"eager": eager, "velm": velm},
        flops=2 * size,
        traffic=2 * size + rows * dim,
        backward_flops=4 * size,
        backward_traffic=4 * size + rows * dim,
        work=size,
    )


def tensor_fusion_case(name: str, batch: int, dims: tuple[int, ...], out: int) -> Case:
    names = [f"x{m}" for m in range(len(dims))]
    features = math.prod(1 + dim for dim in dims)

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs: Inputs = {name: randn(batch, dim) for name, dim in zip(names, dims, strict=True)}
        return inputs | {"weight": randn(out, features) * features**-0.5, "bias": randn(out)}

    def eager(weight: Tensor, bias: Tensor, **inputs: Tensor) -> Tensor:
        first, *others = (F.pad(inputs[name], (1, 0), value=1.0) for name in names)
        for other in others:
            first = (first[:, :, None] * other[:, None, :]).flatten(1)
        return F.linear(first, weight, bias)

    def velm(weight: Tensor, bias: Tensor, **inputs: Tensor) -> Tensor:
        return velm_kernels.tensor_fusion([inputs[name] for name in names], weight, bias)

    product = 2.0 * batch * features * out
    traffic = float(out * features + batch * (sum(dims) + out))
    return Case(
        operator="tensor_fusion",
        name=name,
        shape=f"{batch} rows, {' x '.join(str(1 + dim) for dim in dims)} -> {out}",
        make=make,
        wanted=(*names, "weight", "bias"),
        ways={"eager": eager, "velm": velm},
        flops=product,
        traffic=traffic,
        backward_flops=2 * product,
        backward_traffic=2 * traffic,
        work=float(batch * features),
    )


def low_rank_case(name: str, batch: int, dims: tuple[int, ...], out: int, rank: int) -> Case:
    names = [f"x{m}" for m in range(len(dims))]
    factors = [f"factor{m}" for m in range(len(dims))]

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs: Inputs = {name: randn(batch, dim) for name, dim in zip(names, dims, strict=True)}
        for factor, dim in zip(factors, dims, strict=True):
            inputs[factor] = randn(rank, 1 + dim, out) * (1 + dim) ** -0.5
        return inputs | {"weight": randn(rank), "bias": randn(out)}

    def published(weight: Tensor, bias: Tensor, **inputs: Tensor) -> Tensor:
        product: Tensor | None = None
        for name, factor in zip(names, factors, strict=True):
            x = inputs[name]
            # (rank, batch, out)
            projected = torch.matmul(torch.cat([x.new_ones(batch, 1), x], 1), inputs[factor])
            product = projected if product is None else product * projected
        assert product is not None
        return torch.matmul(weight[None], product.permute(1, 0, 2)).squeeze(1) + bias

    def velm(weight: Tensor, bias: Tensor, **inputs: Tensor) -> Tensor:
        return velm_kernels.low_rank_fusion(
            [inputs[name] for name in names], [inputs[factor] for factor in factors], weight, bias
        )

    features = float(sum(1 + dim for dim in dims))
    product = 2.0 * batch * features * rank * out
    traffic = rank * features * out + batch * (features + out)
    return Case(
        operator="low_rank_fusion",
        name=name,
        shape=f"{batch} rows, {' x '.join(map(str, dims))} -> {out}, rank {rank}",
        make=make,
        wanted=(*names, *factors, "weight", "bias"),
        ways={"eager": published, "velm": velm},
        flops=product,
        traffic=traffic,
        backward_flops=2 * product,
        backward_traffic=2 * traffic,
        work=float(batch * rank * out * len(dims)),
    )


def film_case(name: str, batch: int, regions: int, dim: int, channels_first: bool) -> Case:
    shape = (batch, dim, regions) if channels_first else (batch, regions, dim)

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {"x": randn(*shape), "gamma": randn(batch, dim), "beta": randn(batch, dim)}

    def eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        along = 2 if channels_first else 1
        return gamma.unsqueeze(along) * x + beta.unsqueeze(along)

    def velm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return velm_kernels.film(x, gamma, beta, channels_first=channels_first)

    size = float(batch * regions * dim)
    return Case(
        operator="film",
        name=name,
        shape=f"{batch} x {regions} regions, {dim} features{', channels first' * channels_first}",
        make=make,
        wanted=("x", "gamma", "beta"),
        ways={"eager": eager, "velm": velm},
        flops=2 * size,
        traffic=2 * size + 2 * batch * dim,
        backward_flops=4 * size,
        backward_traffic=3 * size + 4 * batch * dim,
        work=size,
    )


def dropout_residual_case(rows: int, dim: int, dropout_p: float = 0.1) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {name: torch.randn(rows, dim, generator=generator, dtype=torch.float64) for name in ("x", "residual")}

    size = float(rows * dim)
    return Case(
        operator="dropout_residual",
        name="dropout-residual",
        shape=f"{rows} x {dim}",
        make=make,
        wanted=("x", "residual"),
        ways={
            "eager": lambda x, residual: residual + F.dropout(x, dropout_p),
            "velm": lambda x, residual: velm_kernels.dropout_residual(x, residual, dropout_p, seed=1),
        },
        meaning=lambda x, residual: dropout_residual(x, residual, torch.tensor(1), dropout_p),
        flops=2 * size,
        traffic=3 * size,
        backward_flops=size,
        backward_traffic=2 * size,
        work=size,
    )


def weighted_sum_case(name: str, batch: int, regions: int, dim: int, count: int) -> Case:
    """Features of several layers or modalities, the last one the same for all regions."""
    names = [f"x{i}" for i in range(count)]

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs: Inputs = {name: randn(batch, regions, dim) for name in names[:-1]}
        return inputs | {names[-1]: randn(batch, dim), "weights": randn(batch, count)}

    def eager(weights: Tensor, **inputs: Tensor) -> Tensor:
        features = [inputs[name] for name in names[:-1]] + [inputs[names[-1]][:, None]]
        out = weights[:, 0, None, None] * features[0]
        for i, value in enumerate(features[1:], 1):
            out = out + weights[:, i, None, None] * value
        return out

    def velm(weights: Tensor, **inputs: Tensor) -> Tensor:
        return velm_kernels.weighted_sum([inputs[name] for name in names], weights)

    size = float(batch * regions * dim)
    return Case(
        operator="weighted_sum",
        name=name,
        shape=f"{count} features, {batch} x {regions} regions of {dim}",
        make=make,
        wanted=(*names, "weights"),
        ways={"eager": eager, "velm": velm},
        flops=2 * count * size,
        traffic=count * size,
        backward_flops=3 * count * size,
        backward_traffic=(2 * count - 1) * size,
        work=size,
    )


def outer_product_case(name: str, batch: int, regions: int, dx: int, dy: int) -> Case:
    rows = (batch, regions) if regions else (batch,)

    def make(generator: torch.Generator) -> Inputs:
        return {
            key: torch.randn((*rows, dim), generator=generator, dtype=torch.float64)
            for key, dim in (("x", dx), ("y", dy))
        }

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("...i,...j->...ij", x, y) if not regions else torch.einsum("bri,brj->bij", x, y)

    size = float(batch * dx * dy)
    inputs = float(batch * max(1, regions) * (dx + dy))
    return Case(
        operator="outer_product_fusion",
        name=name,
        shape=f"{batch}{f' x {regions}' if regions else ''} rows, {dx} x {dy}",
        make=make,
        wanted=("x", "y"),
        ways={"eager": eager, "velm": velm_kernels.outer_product_fusion},
        flops=2 * size * max(1, regions),
        traffic=size + inputs,
        backward_flops=4 * size * max(1, regions),
        backward_traffic=size + 2 * inputs,
        work=size,
    )


def compact_case(name: str, batch: int, regions: int, dx: int, dy: int, dim: int) -> Case:
    sketch_x, sketch_y = velm_kernels.make_sketch(dx, dim, seed=0), velm_kernels.make_sketch(dy, dim, seed=1)

    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {"x": randn(batch, dx), "y": randn(batch, regions, dy) if regions else randn(batch, dy)}

    def spectrum(x: Tensor, sketch: velm_kernels.Sketch) -> Tensor:
        bucket, sign = (part.to(x.device) for part in sketch)
        sketched = x.new_zeros(*x.shape[:-1], dim).scatter_add(-1, bucket.expand(x.shape), x * sign.to(x.dtype))
        # torch transforms no half precision on the CPU.
        return torch.fft.rfft(sketched.to(torch.promote_types(x.dtype, torch.float32)))

    def published(x: Tensor, y: Tensor) -> Tensor:
        x = x[:, None].expand(-1, regions, -1) if regions else x
        return torch.fft.irfft(spectrum(x, sketch_x) * spectrum(y, sketch_y), n=dim).to(x.dtype)

    def velm(x: Tensor, y: Tensor) -> Tensor:
        a, b = (velm_kernels.Sketch(*(part.to(x.device) for part in pair)) for pair in (sketch_x, sketch_y))
        return velm_kernels.compact_bilinear(x, y, a, b, dim)

    rows = batch * max(1, regions)
    # A real transform of n numbers, and those of one row of x for all regions once.
    transform = 2.5 * dim * math.log2(dim)
    flops = (2 * rows + batch) * transform
    traffic = float(batch * dx + rows * (dy + dim))
    return Case(
        operator="compact_bilinear",
        name=name,
        shape=f"{batch}{f' x {regions}' if regions else ''} rows, {dx} + {dy} -> {dim}",
        make=make,
        wanted=("x", "y"),
        ways={"eager": published, "velm": velm},
        flops=flops,
        traffic=traffic,
        backward_flops=flops,
        backward_traffic=2 * traffic - rows * dim,
        work=float(rows * dim),
    )


def bilinear_attention_case(name: str, batch: int, regions: int, words: int, k: int, glimpses: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs: Inputs = {"v": randn(batch, regions, k), "q": randn(batch, words, k)}
        return inputs | {"h": randn(glimpses, k) * k**-0.5, "bias": randn(glimpses)}

    def maps_of(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.flatten(2).softmax(2).view(logits.shape), logits

    # The published code: h is multiplied into v for every glimpse.
    def published(v: Tensor, q: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.einsum("xhyk,bvk,bqk->bhvq", h[None, :, None], v, q)
        return maps_of(logits + bias[None, :, None, None])

    def small_side(v: Tensor, q: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (h[:, None] * q[:, None]).flatten(1, 2)
        logits = (v @ scaled.transpose(1, 2)).view(batch, regions, glimpses, words)
        return maps_of(logits.transpose(1, 2) + bias[None, :, None, None])

    def velm(v: Tensor, q: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        maps, logits = velm_kernels.bilinear_attention(v, q, h, bias, return_logits=True)
        return maps, logits

    product = 2.0 * batch * glimpses * regions * words * k
    inputs, pairs = float(batch * (regions + words) * k + glimpses * k), float(batch * glimpses * regions * words)
    return Case(
        operator="bilinear_attention",
        name=name,
        shape=f"{batch} x {regions} regions x {words} words, {k}, {glimpses} glimpses",
        make=make,
        wanted=("v", "q", "h", "bias"),
        ways={"eager": published, "peer": small_side, "velm": velm},
        flops=product,
        traffic=inputs + 2 * pairs,
        backward_flops=2 * product,
        backward_traffic=2 * inputs + 3 * pairs,
        work=float(batch * glimpses * regions * k),
    )


def bilinear_attention_pool_case(name: str, batch: int, regions: int, words: int, k: int) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            "v": randn(batch, regions, k),
            "q": randn(batch, words, k),
            "attention": randn(batch, regions * words).softmax(1).view(batch, regions, words),
        }

    def published(v: Tensor, q: Tensor, attention: Tensor) -> Tensor:
        return torch.einsum("bvk,bvq,bqk->bk", v, attention, q)

    product, inputs = 2.0 * batch * regions * words * k, float(batch * (regions + words) * k + batch * regions * words)
    return Case(
        operator="bilinear_attention_pool",
        name=name,
        shape=f"{batch} x {regions} regions x {words} words, {k}",
        make=make,
        wanted=("v", "q", "attention"),
        ways={"eager": published, "velm": velm_kernels.bilinear_attention_pool},
        flops=product,
        traffic=inputs + batch * k,
        backward_flops=3 * product,
        backward_traffic=2 * inputs + batch * k,
        work=float(batch * k * words),
    )


def cases() -> list[Case]:
    """At the sizes of the operators' own cases, and at what has a form that none of these has."""
    size = published()
    return [
        *(bilinear_attention_case(name, **size[name]) for name in ("ban", "ban-100-regions", "ban-patches")),
        bilinear_attention_pool_case("ban-pool", 64, 36, 14, 1280),
        bilinear_attention_pool_case("ban-pool-patches", 4, 576, 64, 768),
        compact_case("mcb", 64, 0, 2048, 2048, 16000),
        compact_case("mcb-regions", **size["mcb-regions"]),
        outer_product_case("outer-product", regions=0, **size["outer-product"]),
        outer_product_case("bilinear-pooling", **size["bilinear-pooling"]),
        film_case("film", **size["film"], channels_first=False),
        film_case("film-pixels", 32, 196, 768, True),
        weighted_sum_case("gated-fusion", **size["gated-fusion"], count=3),
        weighted_sum_case("layer-mix", 16, 128, 768, 13),
        low_rank_case("low-rank-mosi", 128, (32, 32, 64), 64, 4),
        low_rank_case("low-rank-768", 64, (768, 768), 512, 16),
        low_rank_case("low-rank-768-wide", 1024, (768, 768), 512, 16),
        tensor_fusion_case("tensor-fusion-2", 256, (256, 64), 128),
        tensor_fusion_case("tensor-fusion-3", 256, (32, 32, 128), 128),
        factorized_case("mfb-tail", 1024, 5, 1000, "inner", True),
        factorized_case("mutan-tail", 1024, 10, 360, "outer", False),
        factorized_case("mlb-tail", 2048, 1, 1200, "inner", True),
        *(bilinear_case(name, **size[name]) for name in ("bilinear", "bilinear-small", "bilinear-regions")),
    ]

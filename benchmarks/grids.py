"""Maps of tokens made smaller, squares of patches beside each other, tables of positions: transformers' ways beside
velm_kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks.harness import Case, Inputs, published


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gemma_3_case(batch: int, height: int, width: int, dim: int, factor: int = 4) -> Case:
    rows, columns = factor * height, factor * width

    def eager(x: Tensor) -> Tensor:
        maps = x.transpose(1, 2).reshape(batch, dim, rows, columns).contiguous()
        return F.avg_pool2d(maps, factor).flatten(2).transpose(1, 2)

    def means(x: Tensor) -> Tensor:
        return x.view(batch, height, factor, width, factor, dim).mean((2, 4)).view(batch, height * width, dim)

    size, out = float(batch * rows * columns * dim), float(batch * height * width * dim)
    return Case(
        operator="pool_grid",
        name="gemma-3-pool",
        shape=f"{batch} x {rows} x {columns} x {dim}, {factor} x {factor}",
        make=lambda generator: {"x": _randn(generator, batch, rows * columns, dim)},
        wanted=("x",),
        ways={
            "eager": eager,
            "view and mean": means,
            "velm": lambda x: velm_kernels.pool_grid(x, rows, columns, factor),
        },
        flops=size,
        traffic=size + out,
        backward_flops=size,
        backward_traffic=size + out,
        work=size,
    )


def gemma_4_case(tokens: int = 2520, dim: int = 768, factor: int = 3) -> Case:
    """Four pictures of different sizes, padded."""
    heights, widths = torch.tensor([42, 60, 30, 45]), torch.tensor([60, 42, 84, 51])
    batch, length = len(heights), tokens // factor**2
    positions = torch.full((batch, tokens, 2), -1)
    for entry, height, width in zip(positions, heights.tolist(), widths.tolist(), strict=True):
        entry[: height * width, 0] = torch.arange(width).repeat(height)
        entry[: height * width, 1] = torch.arange(height).repeat_interleave(width)

    def eager(x: Tensor, positions: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
        x = x.masked_fill((positions[..., 0] < 0).unsqueeze(-1), 0.0)
        clamped = positions.clamp(min=0)
        columns = clamped[..., 0].max(dim=-1, keepdim=True)[0] + 1
        square = torch.div(clamped, factor, rounding_mode="floor")
        number = square[..., 0] + (columns // factor) * square[..., 1]
        weights = F.one_hot(number, length).to(torch.promote_types(x.dtype, torch.float32)) / factor**2
        return (weights.transpose(1, 2) @ x.to(weights.dtype)).to(x.dtype)

    def make(generator: torch.Generator) -> Inputs:
        x = _randn(generator, batch, tokens, dim)
        return {"x": x, "positions": positions, "heights": heights, "widths": widths}

    size, out = float(batch * tokens * dim), float(batch * length * dim)
    return Case(
        operator="pool_grid",
        name="gemma-4-pool",
        shape=f"{batch} x {tokens} x {dim}, maps of 4 sizes, {factor} x {factor}",
        make=make,
        wanted=("x",),
        ways={
            "eager": eager,
            "velm": lambda x, positions, heights, widths: velm_kernels.pool_grid(x, heights, widths, factor),
        },
        flops=size,
        traffic=size + out,
        backward_flops=size,
        backward_traffic=size + out,
        work=2.0 * batch * length * tokens,
    )


def llava_onevision_case(batch: int, height: int, width: int, dim: int) -> Case:
    rows, columns = 2 * height + 1, 2 * width + 1

    def interpolated(maps: Tensor) -> Tensor:
        small = F.interpolate(maps, (height + 1, width + 1), mode="bilinear")
        return small.permute(0, 2, 3, 1).reshape(batch, -1, dim)

    def maps_of(x: Tensor) -> Tensor:
        return x.view(batch, rows, columns, dim).permute(0, 3, 1, 2)

    size, out = float(batch * rows * columns * dim), float(batch * (height + 1) * (width + 1) * dim)
    return Case(
        operator="pool_grid",
        name="llava-onevision-pool",
        shape=f"{batch} x {rows} x {columns} x {dim}, bilinear",
        make=lambda generator: {"x": _randn(generator, batch, rows * columns, dim)},
        wanted=("x",),
        ways={
            "eager": lambda x: interpolated(maps_of(x).contiguous()),
            "channels last": lambda x: interpolated(maps_of(x)),
            "velm": lambda x: velm_kernels.pool_grid(x, rows, columns, 2, "bilinear"),
        },
        flops=8 * out,
        traffic=size + out,
        backward_flops=8 * out,
        backward_traffic=size + out,
        work=size,
    )


def merger_case(batch: int, height: int, width: int, dim: int) -> Case:
    """Pictures of one size, so that one permutation does as a peer what transformers does for each."""
    size = (2 * height, 2 * width)
    tokens = size[0] * size[1]

    def unfold(x: Tensor) -> Tensor:
        merged = [
            F.unfold(picture.view(*size, dim).permute(2, 0, 1)[None], 2, stride=2).view(4 * dim, -1).t()
            for picture in x.split([tokens] * batch)
        ]
        return torch.cat(merged)

    def permute(x: Tensor) -> Tensor:
        return x.view(batch, height, 2, width, 2, dim).permute(0, 1, 3, 5, 2, 4).reshape(-1, 4 * dim)

    sizes = [size] * batch
    elements = float(batch * tokens * dim)
    return Case(
        operator="merge_patches",
        name="mistral3-merger",
        shape=f"{batch} x {size[0]} x {size[1]} x {dim}, 2 x 2",
        make=lambda generator: {"x": _randn(generator, batch * tokens, dim)},
        wanted=("x",),
        ways={
            "eager": unfold,
            "permute": permute,
            "velm": lambda x: velm_kernels.merge_patches(x, sizes, 2, order="channels"),
        },
        flops=elements,
        traffic=2 * elements,
        backward_flops=elements,
        backward_traffic=2 * elements,
        work=elements,
    )


def table_case(name: str, mode: str, positions: int, height: int, width: int, dim: int) -> Case:
    side = int((positions // 2) ** 0.5)
    taps = velm_kernels.resize_taps([(side, side)] * 2, (height, width), mode, align_corners=mode == "bilinear")
    indices, weights = taps[0].long(), taps[1].double()

    def eager(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return (F.embedding(indices, table) * weights[..., None]).sum(1)

    def bag(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")

    count, out = indices.shape[1], float(len(indices) * dim)
    rows = float(height * width * dim)
    return Case(
        operator="interpolated_embedding",
        name=name,
        shape=f"{len(indices)} of {height} x {width} x {dim}, {count} taps",
        make=lambda generator: {
            "table": _randn(generator, height * width, dim),
            "indices": indices,
            "weights": weights,
        },
        wanted=("table",),
        ways={
            "eager": eager,
            "embedding_bag": bag,
            "velm": lambda table, indices, weights: velm_kernels.interpolated_embedding(table, (indices, weights)),
        },
        flops=2 * count * out,
        traffic=rows + out,
        backward_flops=2 * count * out,
        backward_traffic=rows + out,
        work=count * out,
    )


def cases() -> list[Case]:
    size = published()
    tables = {
        name: {key: n for key, n in size[name].items() if key != "batch"} for name in ("qwen3-vl-table", "kimi-table")
    }
    return [
        gemma_3_case(**size["gemma-3-pool"]),
        gemma_4_case(),
        llava_onevision_case(**size["llava-onevision-pool"]),
        merger_case(**size["mistral3-merger"]),
        table_case("qwen3-vl-table", "bilinear", **tables["qwen3-vl-table"]),
        table_case("kimi-table", "bicubic", **tables["kimi-table"]),
    ]
